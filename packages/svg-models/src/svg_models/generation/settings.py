"""What to generate, checked."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from svg_models.errors import SettingError
from svg_models.loading import Defaults

__all__ = ["Settings", "check_numbers"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to generate, complete: every field has its value.

    Args:
        prompt: what the clip shows.
        negative_prompt: what guidance steers away from; `None` leaves it to the pipeline.
        steps: denoising steps, 1 or more.
        guidance: classifier-free guidance scale, 0 or more; up to 1 turns guidance off.
        height: pixels.
        width: pixels.
        frames: video frames.
        fps: frames a second of the file.
        seed: of the initial noise, drawn on the CPU so that it is the same on every device.
        max_sequence_length: text tokens the pipeline pads to; `None` leaves it to the pipeline.
        image: file of a picture that the clip starts from, or `None`.
        video: file of a video that the clip starts from, or `None`.
        strength: share of the steps that are run on a video that is redrawn, above 0 and up to 1:
            1 keeps nothing of it; `None` if none is redrawn.

    Raises:
        SettingError: if a number is out of its range.
    """

    prompt: str
    negative_prompt: str | None
    steps: int
    guidance: float
    height: int
    width: int
    frames: int
    fps: float
    seed: int
    max_sequence_length: int | None = None
    image: str | None = None
    video: str | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        check_numbers(
            steps=self.steps,
            guidance=self.guidance,
            fps=self.fps,
            seed=self.seed,
            height=self.height,
            width=self.width,
            frames=self.frames,
            strength=self.strength,
        )
        if self.steps_to_run < 1:
            raise SettingError(
                f"strength {self.strength:g} of {self.steps} steps leaves none to run; raise one"
            )

    @property
    def steps_to_run(self) -> int:
        """Denoising steps that run: all of them, unless a video is redrawn."""
        return self.steps if self.strength is None else int(self.steps * self.strength)

    @classmethod
    def resolve(cls, defaults: Defaults, **given: Any) -> Settings:
        """Fill what was not given (or given as `None`) from a model's defaults."""
        known = {field.name for field in fields(cls)}
        values = {k: v for k, v in asdict(defaults).items() if k in known} | {"seed": 0}
        unknown = set(given) - known
        if unknown:
            raise TypeError(f"unknown settings {sorted(unknown)}; known are {sorted(known)}")
        return cls(**values | {key: value for key, value in given.items() if value is not None})


def check_numbers(**numbers: float | None) -> None:
    """Refuse numbers no model could use; `None` means not given.

    Raises:
        SettingError: names the first that is out of range.
    """
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise SettingError(f"{name} must be a finite number, got {value}")
    at_least = {"steps": 1, "guidance": 0, "seed": 0, "height": 1, "width": 1, "frames": 1}
    for name, least in at_least.items():
        value = numbers.get(name)
        if value is not None and not value >= least:
            raise SettingError(f"{name} must be {least} or more, got {value:g}")
    for name in ("fps", "strength"):
        value = numbers.get(name)
        if value is not None and not value > 0:
            raise SettingError(f"{name} must be above 0, got {value:g}")
    strength = numbers.get("strength")
    if strength is not None and strength > 1:
        raise SettingError(f"strength must be at most 1, got {strength:g}")
