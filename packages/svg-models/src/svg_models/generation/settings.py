"""What to generate: as a person asks for it, and complete."""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from svg_models.errors import SettingError

if TYPE_CHECKING:
    import os

    from typing_extensions import Self

    from svg_models.loading import Defaults

__all__ = ["Option", "Settings", "option", "options_of"]

WHAT, HOW, WHERE = "What to generate", "Attention", "Machine and output"


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is said about a field once: to people, to the command line, and to the check.

    Attributes:
        help: one line.
        panel: the group that it belongs to.
        kind: type of its value.
        names: what the command line calls it; empty for what it has no option for.
        metavar: stands for the value there.
        repeats: may be given more than once.
        least: smallest value.
        above: what the value must exceed.
        most: largest value.
    """

    help: str
    panel: str = WHAT
    kind: type = str
    names: tuple[str, ...] = ()
    metavar: str | None = None
    repeats: bool = False
    least: float | None = None
    above: float | None = None
    most: float | None = None

    def checked(self, name: str, value: Any) -> Any:
        """Return a value as `kind`; numbers of NumPy become Python's.

        Raises:
            SettingError: if it is of another type or out of range.
        """
        if self.kind not in (int, float) or value is None:
            return value
        family = numbers.Integral if self.kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, family):
            what = "a whole number" if self.kind is int else "a number"
            raise SettingError(f"{name} must be {what}, got {value!r}")
        value = int(value) if self.kind is int else float(value)  # type: ignore[call-overload]
        if not math.isfinite(value):
            raise SettingError(f"{name} must be a finite number, got {value}")
        if self.least is not None and value < self.least:
            raise SettingError(f"{name} must be {self.least:g} or more, got {value:g}")
        if self.above is not None and value <= self.above:
            raise SettingError(f"{name} must be above {self.above:g}, got {value:g}")
        if self.most is not None and value > self.most:
            raise SettingError(f"{name} must be at most {self.most:g}, got {value:g}")
        return value


def option(default: Any, help: str, *names: str, positional: bool = False, **about: Any) -> Any:
    """Return a dataclass field that says about itself what `Option` holds."""
    metadata = {"option": Option(help=help, names=names, **about)}
    return field(default=default, kw_only=not positional, metadata=metadata)


def options_of(kind: type) -> dict[str, Option]:
    """Return what each field of a class of settings says about itself."""
    return {f.name: f.metadata["option"] for f in fields(kind) if "option" in f.metadata}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to generate. `None` means not given, until `complete` takes it from the model.

    Raises:
        SettingError: if a number is out of its range.
    """

    prompt: str = option(
        None, "What the clip shows. [dim]Default: an example of the model.[/]", positional=True
    )
    negative_prompt: str | None = option(None, "What to steer away from.", "--negative-prompt")
    image: str | os.PathLike[str] | None = option(
        None, "A picture to start from, for image-to-video models.", "--image", metavar="PATH"
    )
    video: str | os.PathLike[str] | None = option(
        None,
        "A video to start from: redrawn, followed or continued, as the model does.",
        "--video",
        metavar="PATH",
    )
    strength: float | None = option(
        None,
        "How much of the video is redrawn, above 0 and up to 1.",
        "--strength",
        kind=float,
        above=0,
        most=1,
    )
    steps: int = option(
        None, "Denoising steps.", "--steps", "--num-inference-steps", kind=int, least=1
    )
    guidance: float = option(
        None,
        "Strength of classifier-free guidance; up to 1 turns it off.",
        "--guidance",
        "--guidance-scale",
        kind=float,
        least=0,
    )
    height: int = option(None, "Pixels.", kind=int, least=1)
    width: int = option(None, "Pixels.", kind=int, least=1)
    frames: int = option(
        None,
        "Video frames, for most models a multiple of 4 plus 1.",
        "--frames",
        "--num-frames",
        kind=int,
        least=1,
    )
    fps: float = option(None, "Frames a second.", "--fps", kind=float, above=0)
    seed: int = option(
        0, "Start of the noise; one seed, one clip.", "--seed", kind=int, least=0, most=2**64 - 1
    )
    max_sequence_length: int | None = option(
        None, "Text tokens that the pipeline pads to.", kind=int, least=1
    )

    def __post_init__(self) -> None:
        for name, about in options_of(type(self)).items():
            object.__setattr__(self, name, about.checked(name, getattr(self, name)))
        if self.seed is None:
            object.__setattr__(self, "seed", 0)
        if self.steps is not None and self.steps_to_run < 1:
            raise SettingError(
                f"strength {self.strength:g} of {self.steps} steps leaves none to run; raise one"
            )

    @property
    def steps_to_run(self) -> int:
        """Denoising steps that run: all of them, unless a video is redrawn."""
        return self.steps if self.strength is None else int(self.steps * self.strength)

    def given(self) -> dict[str, Any]:
        """Return the settings that were given, by name."""
        known = ((f.name, getattr(self, f.name)) for f in fields(Settings))
        return {name: value for name, value in known if value is not None}

    def complete(self, defaults: Defaults, **chosen: Any) -> Settings:
        """Fill what was not given from what was chosen for this clip, then from the model.

        Args:
            defaults: of the model.
            **chosen: settings that follow from what the clip starts from.
        """
        names = {f.name for f in fields(Settings)}
        usual = {k: v for k, v in dataclasses.asdict(defaults).items() if k in names}
        values = usual | chosen | self.given()
        for name in ("image", "video"):
            values[name] = None if values.get(name) is None else str(values[name])
        return Settings(**values)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values."""
        return dataclasses.replace(self, **changes)
