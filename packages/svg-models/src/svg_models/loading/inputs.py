"""Which pipeline class makes a clip of what was given: a prompt, an image, a video."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from svg_models.errors import ModelUnavailableError, SettingError
from svg_models.loading.folder import ModelIndex

__all__ = ["SIBLINGS", "Inputs", "choose_pipeline"]

IMAGE_ARGUMENTS = ("image", "reference_images")
EITHER = ("CosmosVideoToWorldPipeline", "Cosmos2VideoToWorldPipeline")


@dataclass(frozen=True, kw_only=True)
class Sibling:
    """Another diffusers pipeline that runs the same weights.

    Attributes:
        name: its class.
        takes: what it wants beside a prompt, `"image"` or `"video"`.
        only_if: key of `model_index.json` that must be true for the weights to fit.
    """

    name: str
    takes: Literal["image", "video"]
    only_if: str = ""


SIBLINGS: dict[str, tuple[Sibling, ...]] = {
    "WanPipeline": (
        Sibling(name="WanImageToVideoPipeline", takes="image", only_if="expand_timesteps"),
        Sibling(name="WanVideoToVideoPipeline", takes="video"),
    ),
    "CogVideoXPipeline": (Sibling(name="CogVideoXVideoToVideoPipeline", takes="video"),),
    "LTXPipeline": (Sibling(name="LTXImageToVideoPipeline", takes="image"),),
}
"""Class that a checkpoint names -> what else its weights can do."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the call of a pipeline class takes beside a prompt.

    Attributes:
        name: of the class.
        image: name of the argument for an image; empty if there is none.
        video: what it does with a video: `"redraw"` it from noise laid over it, `"follow"` it as a
            guide for each frame, `"continue"` it; empty if it takes none.
        needs: nothing, `"image"`, `"video"`, or `"image or video"`.
        lacks: arguments that it must be given and that a clip has no setting for.
    """

    name: str
    image: str = ""
    video: Literal["", "redraw", "follow", "continue"] = ""
    needs: str = ""
    lacks: tuple[str, ...] = ()

    @classmethod
    def of(cls, pipeline: type) -> Inputs:
        """Read the signature of a pipeline class."""
        arguments = inspect.signature(pipeline.__call__).parameters
        image = next((name for name in IMAGE_ARGUMENTS if name in arguments), "")
        video: Literal["", "redraw", "follow", "continue"] = ""
        if "video" in arguments:
            video = "redraw" if "num_frames" not in arguments else "continue"
            video = "follow" if "mask" in arguments else video
        needs = "video" if video == "redraw" else ""
        if image == "image" and not video:
            needs = "image"
        if pipeline.__name__ in EITHER:
            needs = "image or video"
        lacks = tuple(
            name
            for name, argument in arguments.items()
            if argument.default is argument.empty
            and argument.kind is argument.POSITIONAL_OR_KEYWORD
            and name not in ("self", "prompt", "video", *IMAGE_ARGUMENTS)
        )
        return cls(name=pipeline.__name__, image=image, video=video, needs=needs, lacks=lacks)

    def check(self, model: str, *, image: bool, video: bool) -> None:
        """Refuse what the pipeline cannot take, and what it lacks.

        Args:
            model: its name for people.
            image: whether an image is given.
            video: whether a video is given.

        Raises:
            SettingError: says what to give instead.
        """
        if self.lacks:
            raise SettingError(
                f"{model} must be given {' and '.join(self.lacks)}, for which there is no setting "
                f"here; call {self.name} in Python, with sparsify(pipe) around the call"
            )
        if image and not self.image:
            raise SettingError(
                f"{model} cannot start from an image ({self.name} takes none); leave --image out, "
                "or choose an image-to-video model"
            )
        if video and not self.video:
            raise SettingError(
                f"{model} cannot start from a video ({self.name} takes none); leave --video out, "
                "or choose a model with a video-to-video pipeline"
            )
        if image and video and self.video != "follow":
            raise SettingError(f"{model} starts from an image or from a video; give one of them")
        wanted = self.needs.split(" or ") if self.needs else []
        given = {"image": image, "video": video}
        if wanted and not any(given[what] for what in wanted):
            options = " or ".join(f"--{what} PATH" for what in wanted)
            raise SettingError(f"{model} does not start from a prompt alone; add {options}")


def choose_pipeline(model: str, index: ModelIndex, *, image: bool, video: bool) -> type[Any]:
    """Return the pipeline class that runs a checkpoint on what is given.

    Args:
        model: its name for people.
        index: of the checkpoint.
        image: whether an image is given.
        video: whether a video is given.

    Returns:
        The class that the checkpoint names, or a sibling that runs the same weights.

    Raises:
        SettingError: if no class takes what is given, or what is needed was not given.
        ModelUnavailableError: if diffusers has no such pipeline.
    """
    own = _pipeline_class(model, index.pipeline)
    inputs = Inputs.of(own)
    if (image and not inputs.image) or (video and not inputs.video):
        for sibling in SIBLINGS.get(own.__name__, ()):
            given = {"image": image, "video": video}[sibling.takes]
            fits = not sibling.only_if or index.options.get(sibling.only_if)
            if given and fits:
                own = _fitting(model, _pipeline_class(model, sibling.name), index.components)
                inputs = Inputs.of(own)
    inputs.check(model, image=image, video=video)
    return own


def _pipeline_class(model: str, name: str) -> type[Any]:
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ModelUnavailableError(
            f"{model} needs diffusers.{name}, which diffusers {diffusers.__version__} does not have"
        )
    if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise ModelUnavailableError(f"{model} names diffusers.{name}, which is no pipeline")
    return kind


def _fitting(model: str, kind: type[Any], parts: Iterable[str]) -> type[Any]:
    known = inspect.signature(kind.__init__).parameters
    lost = sorted(set(parts) - set(known))
    if lost:
        raise SettingError(
            f"{model} has {', '.join(lost)}, which diffusers.{kind.__name__} would leave out; "
            "choose a model without"
        )
    return kind
