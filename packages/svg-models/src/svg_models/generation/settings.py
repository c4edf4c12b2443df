"""What to generate: as a person asks for it, and complete."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from svg_models.errors import MachineError, SettingError
from svg_models.loading.memory import GIB, machine_memory
from svg_models.numeric import as_number, as_whole, written
from svg_models.spelling import did_you_mean
from svg_models.video import FPS, LARGEST_SIDE

if TYPE_CHECKING:
    from typing_extensions import Self

    from svg_models.loading import Defaults

__all__ = ["MEDIA", "Option", "Settings", "option", "options_of"]

MEDIA = ("image", "last_image", "video")
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
        choices: the words that it may be; empty for any.
        suggestions: words that a shell completes, beside others that it may be.
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
    choices: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()

    def checked(self, name: str, value: Any) -> Any:
        """Return a value as `kind`; numbers of NumPy become Python's.

        Raises:
            SettingError: if it is of another type or out of range.
        """
        if self.choices and isinstance(value, str) and value not in self.choices:
            raise SettingError(
                f"{name} must be one of {', '.join(self.choices)}, got {written(value)}"
                f"{did_you_mean(value, self.choices)}"
            )
        if self.kind is bool and not isinstance(value, bool):
            raise SettingError(f"{name} must be True or False, got {written(value)}")
        if self.kind not in (int, float) or value is None:
            return value
        number = (as_whole if self.kind is int else as_number)(name, value)
        if self.above is not None and number <= self.above:
            raise SettingError(f"{name} must be above {self.above:g}, got {written(number)}")
        if self.least is not None and number < self.least:
            raise SettingError(f"{name} must be {self.least:g} or more, got {written(number)}")
        if self.most is not None and number > self.most:
            raise SettingError(f"{name} must be at most {self.most:,}, got {written(number)}")
        return number


def option(default: Any, help: str, *names: str, positional: bool = False, **about: Any) -> Any:
    """Return a dataclass field that says about itself what `Option` holds; of a bool, a flag."""
    if isinstance(default, bool):
        about["kind"] = bool
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
        None, "What the clip shows. [dim]Default: the model's example prompt.[/]", positional=True
    )
    negative_prompt: str | None = option(
        None, "What the clip should not show.", "--negative-prompt"
    )
    image: str | os.PathLike[str] | None = option(
        None, "Image to start from, for image-to-video models.", "--image", metavar="PATH"
    )
    last_image: str | os.PathLike[str] | None = option(
        None,
        "Image to end with, for models that take a first and a last one.",
        "--last-image",
        metavar="PATH",
    )
    video: str | os.PathLike[str] | None = option(
        None,
        "Video to start from; the model redraws, follows or continues it.",
        "--video",
        metavar="PATH",
    )
    strength: float | None = option(
        None,
        "How much of the video is redrawn, above 0, at most 1.",
        "--strength",
        kind=float,
        above=0,
        most=1,
    )
    steps: int = option(
        None,
        "Number of denoising steps.",
        "--steps",
        "--num-inference-steps",
        kind=int,
        least=1,
        most=10_000,
    )
    guidance: float = option(
        None,
        "Scale of classifier-free guidance; 1 or less turns it off.",
        "--guidance",
        "--guidance-scale",
        kind=float,
        least=0,
        most=1000,
    )
    flow_shift: float | None = option(
        None,
        "Shift of the scheduler's timesteps towards noise. [dim]Default: the model's.[/]",
        "--flow-shift",
        kind=float,
        above=0,
        most=100,
    )
    height: int = option(None, "Pixels.", kind=int, least=1, most=LARGEST_SIDE)
    width: int = option(None, "Pixels.", kind=int, least=1, most=LARGEST_SIDE)
    frames: int = option(
        None,
        "Number of frames, for most models a multiple of 4 plus 1.",
        "--frames",
        "--num-frames",
        kind=int,
        least=1,
        most=100_000,
    )
    fps: float = option(
        None, "Frames per second.", "--fps", kind=float, above=0, least=FPS[0], most=FPS[1]
    )
    seed: int = option(
        0,
        "Seed of the noise; the same seed gives the same clip.",
        "--seed",
        kind=int,
        least=0,
        most=2**64 - 1,
    )
    max_sequence_length: int | None = option(
        None, "Number of text tokens that the pipeline pads to.", kind=int, least=1, most=1 << 20
    )

    def __post_init__(self) -> None:
        for name, about in options_of(type(self)).items():
            object.__setattr__(self, name, about.checked(name, getattr(self, name)))
        for name in ("prompt", "negative_prompt", *MEDIA):
            value = getattr(self, name)
            kinds = (str, os.PathLike) if name in MEDIA else (str,)
            if value is not None and not isinstance(value, kinds):
                raise SettingError(f"{name} must be a text, got a {type(value).__name__}")
            if isinstance(value, str) and name in ("prompt", "negative_prompt"):
                _check_unicode(name, value)
        if self.last_image is not None and self.image is None:
            raise SettingError("a last_image ends what an image begins; give the image, too")
        check_clip_memory(self.frames or 1, self.height or 1, self.width or 1)
        if self.seed is None:
            object.__setattr__(self, "seed", 0)
        if self.steps is not None and self.steps_to_run < 1:
            raise SettingError(
                f"strength {self.strength:g} of {self.steps} steps leaves none to run; raise one"
            )

    @property
    def steps_to_run(self) -> int:
        """Return the denoising steps that run: all of them, unless a video is redrawn."""
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
        for name in MEDIA:
            values[name] = None if values.get(name) is None else str(values[name])
        return Settings(**values)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values."""
        return dataclasses.replace(self, **changes)


def _check_unicode(name: str, text: str) -> None:
    """Refuse a text with half a character, as comes of a terminal that does not write UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SettingError(
            f"{name} must be text in UTF-8, got {text[error.start : error.end][:8]!a} at "
            f"character {error.start + 1}"
        ) from error


def check_clip_memory(frames: int, height: int, width: int) -> None:
    """Refuse a clip whose pictures alone, three float32 a pixel, are more than the memory.

    Raises:
        MachineError: says what they take.
    """
    need, have = frames * height * width * 3 * 4, machine_memory()
    if need > have:
        raise MachineError(
            f"{frames:,} frames of {width} x {height} take {need / GIB:,.0f} GiB, and this machine "
            f"has {have / GIB:,.0f} GiB of memory; take fewer frames or a smaller size"
        )
