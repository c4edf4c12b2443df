"""The sizes a pipeline accepts, and the tokens they become."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from svg_models.errors import SettingError

__all__ = ["Geometry"]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes a pipeline accepts and the tokens they become.

    Args:
        space: pixels per latent pixel along a side.
        time: video frames per latent frame, the first frame excepted.
        patch: latent frames, rows and columns per token.
        multiple: what height and width must be divisible by.
    """

    space: int
    time: int
    patch: tuple[int, int, int]
    multiple: int

    @classmethod
    def of(cls, pipe: Any) -> Geometry:
        """Read the sizes from a loaded pipeline."""
        space = int(getattr(pipe, "vae_scale_factor_spatial", 8))
        time = int(getattr(pipe, "vae_scale_factor_temporal", 4))
        transformer = getattr(pipe, "transformer", None) or pipe.transformer_2
        patch = transformer.config.get("patch_size", (1, 2, 2))
        if isinstance(patch, int):
            patch = (int(transformer.config.get("patch_size_t") or 1), patch, patch)
        # diffusers' pipelines ask for 16 whatever the VAE
        step = space * max(patch[1:])
        multiple = math.lcm(16, step)
        return cls(space=space, time=time, patch=tuple(patch), multiple=multiple)

    def tokens(self, *, height: int, width: int, frames: int) -> int:
        """Return the number of video tokens of a clip."""
        latent = (frames - 1) // self.time + 1
        t, h, w = self.patch
        return (latent // t) * (height // self.space // h) * (width // self.space // w)

    def check(self, *, height: int, width: int, frames: int) -> None:
        """Refuse sizes that the pipeline would round.

        Raises:
            SettingError: names the nearest sizes that are valid.
        """
        bad = [s for s in (height, width) if s < self.multiple or s % self.multiple]
        if bad:
            near = [max(1, round(s / self.multiple)) * self.multiple for s in (height, width)]
            raise SettingError(
                f"height and width must be multiples of {self.multiple} (VAE factor {self.space}), "
                f"got {height} x {width}; the nearest valid size is {near[0]} x {near[1]}"
            )
        if frames < 1 or (frames - 1) % self.time:
            near_frames = max(0, round((frames - 1) / self.time)) * self.time + 1
            raise SettingError(
                f"frames must be a multiple of {self.time} plus 1, got {frames}; "
                f"the nearest valid number is {near_frames}"
            )
