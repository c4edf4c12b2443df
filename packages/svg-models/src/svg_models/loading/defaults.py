"""What a model generates when nothing else is said."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from svg_models.families import family_of

__all__ = ["Defaults", "defaults_for", "of_call"]

# field -> the argument of diffusers' pipelines whose default says it
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "steps": ("num_inference_steps",),
    "guidance": ("guidance_scale",),
    "height": ("height",),
    "width": ("width",),
    "frames": ("num_frames",),
    "fps": ("fps", "frame_rate"),
}


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a model generates when nothing else is said.

    Args:
        prompt: a prompt that shows the model at work.
        negative_prompt: what guidance steers away from; `None` leaves it to the pipeline.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        height: pixels.
        width: pixels.
        frames: video frames.
        fps: frames a second when written to a file, and what a model that asks is told.
        max_sequence_length: text tokens the pipeline pads to; `None` leaves it to the pipeline.
        one_size: other sizes than this are not what the model was trained on.
    """

    prompt: str = "A red fox runs through fresh snow, camera moving alongside, golden light"
    negative_prompt: str | None = None
    steps: int = 50
    guidance: float = 5.0
    height: int = 480
    width: int = 832
    frames: int = 81
    fps: float = 16
    max_sequence_length: int | None = None
    one_size: bool = False


def defaults_for(name: str, pipe: Any) -> Defaults:
    """Return what a model generates when nothing else is said.

    In order: what the embedded model was trained on, what the family says of the checkpoint, the
    defaults of the pipeline's own call, those of `Defaults`.

    Args:
        name: "embedded" for the embedded model.
        pipe: the pipeline.
    """
    transformer = getattr(pipe, "transformer", None) or pipe.transformer_2
    usual = of_call(type(pipe)) | dict(family_of(transformer).usual(transformer))
    guider = getattr(pipe, "guider", None)
    if guider is not None:
        usual["guidance"] = guider.guidance_scale
    defaults = replace(Defaults(), **usual)
    if name != "embedded":
        return defaults
    from svg_models.embedded.defaults import FRAMES, GUIDANCE, SHEET_PROMPTS, SIDE, STEPS

    return replace(
        defaults,
        prompt=SHEET_PROMPTS[0],
        steps=STEPS,
        guidance=GUIDANCE,
        height=SIDE,
        width=SIDE,
        frames=FRAMES,
        one_size=True,
    )


def of_call(pipeline: type[Any]) -> dict[str, Any]:
    """Return the fields of `Defaults` that the call of a pipeline class says."""
    arguments = inspect.signature(pipeline.__call__).parameters
    found = {}
    for field, names in _ARGUMENTS.items():
        for name in names:
            value = arguments[name].default if name in arguments else None
            if isinstance(value, int | float):
                found[field] = value
    return found
