"""A generated clip and how it came about."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svg_models.generation.settings import Settings
from svg_models.method_names import MethodSpec
from svg_models.stats import RunStats
from svg_models.video import write_video

__all__ = ["Clip"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A generated clip and how it came about.

    Attributes:
        frames: uint8 `[F, H, W, 3]`.
        settings: what was asked for.
        method: what attention was asked for; what `auto` came to.
        model: name of the model.
        loras: adapters that it had, each with its weight.
        seconds: time of the denoising loop.
        step_seconds: time of each step; exact only if profiled, else a device may lag behind.
        decode_seconds: time of the VAE afterwards.
        stats: densities and times of every attention call, and the recipe.
    """

    frames: np.ndarray
    settings: Settings
    method: MethodSpec
    model: str
    loras: tuple[str, ...]
    seconds: float
    step_seconds: tuple[float, ...]
    decode_seconds: float
    stats: RunStats

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the clip as an mp4; see `svg_models.video.write_video`."""
        return write_video(self.frames, path, fps=self.settings.fps)
