"""The sizes a pipeline accepts, and the tokens they become."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from svg_models.errors import ModelUnavailableError, SettingError, foreign_faults

__all__ = ["Geometry"]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes a pipeline accepts and the tokens they become.

    Args:
        space: pixels per latent pixel along a side.
        time: video frames per latent frame, the first frame excepted.
        patch: latent frames, rows and columns per token.
        multiple: what height and width must be divisible by.
        frame_step: frames must be a multiple of this plus 1.
        only: the one height and width that the model knows, or None.
        positions: tokens that the model can tell apart along each axis, or None if any number.
    """

    space: int
    time: int
    patch: tuple[int, int, int]
    multiple: int
    frame_step: int
    only: tuple[int, int] | None = None
    positions: int | None = None

    @classmethod
    def of(cls, pipe: Any) -> Geometry:
        """Read the sizes from a loaded pipeline.

        Raises:
            ModelUnavailableError: if its configuration gives no sizes.
        """
        with foreign_faults(
            f"{type(pipe).__name__} does not say which sizes it takes", ModelUnavailableError
        ):
            return cls._of(pipe)

    @classmethod
    def _of(cls, pipe: Any) -> Geometry:
        space, time = (
            _factor(
                pipe,
                f"vae_scale_factor_{axis}",
                f"vae_{axis}_compression_ratio",
                f"vae_{axis}_scale_factor",
            )
            for axis in ("spatial", "temporal")
        )
        config = (getattr(pipe, "transformer", None) or pipe.transformer_2).config
        patch = config.get("patch_size", (1, 2, 2))
        if isinstance(patch, int):
            patch = (int(config.get("patch_size_t") or 1), patch, patch)
        if len(patch) != 3 or not all(isinstance(side, int) and side > 0 for side in patch):
            raise ValueError(f"patch_size must be three whole numbers, got {patch}")
        learned = config.get("use_learned_positional_embeddings", False)
        return cls(
            space=space,
            time=time,
            patch=tuple(patch),
            # diffusers' pipelines ask for 16 whatever the VAE
            multiple=math.lcm(16, space * max(patch[1:])),
            # CogVideoX's VAE works on pairs of latent frames after the first
            frame_step=time * getattr(pipe.vae, "num_latent_frames_batch_size", 1),
            only=(config.sample_height * space, config.sample_width * space) if learned else None,
            positions=_positions(config, patch),
        )

    def latent_frames(self, frames: int) -> int:
        """Return the latent frames of so many video frames."""
        return (frames - 1) // self.time + 1

    def tokens(self, *, height: int, width: int, frames: int) -> int:
        """Return the number of video tokens of a clip."""
        t, h, w = self.patch
        return (
            math.ceil(self.latent_frames(frames) / t)
            * (height // self.space // h)
            * (width // self.space // w)
        )

    def nearest_size(self, *, height: float, width: float) -> dict[str, int]:
        """Return the valid height and width that are nearest."""
        if self.only is not None:
            return dict(zip(("height", "width"), self.only, strict=True))
        sides = {"height": height, "width": width}
        return {n: max(1, round(s / self.multiple)) * self.multiple for n, s in sides.items()}

    def most_frames(self, limit: int) -> int:
        """Return the largest valid number of frames up to `limit`, at least 1."""
        return max(0, limit - 1) // self.frame_step * self.frame_step + 1

    def check_given(
        self, *, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> None:
        """Refuse the sizes that somebody chose, whatever the others will be; see `check`."""
        valid = self.nearest_size(height=height or 1, width=width or 1)
        self.check(
            height=valid["height"] if height is None else height,
            width=valid["width"] if width is None else width,
            frames=1 if frames is None else frames,
        )

    def check(self, *, height: int, width: int, frames: int) -> None:
        """Refuse sizes that the pipeline would round.

        Raises:
            SettingError: names the nearest sizes that are valid.
        """
        near = self.nearest_size(height=height, width=width)
        if near != {"height": height, "width": width}:
            rule = f"multiples of {self.multiple} (VAE factor {self.space})"
            if self.only is not None:
                rule = f"{self.only[0]} and {self.only[1]}, the one size this model knows"
            raise SettingError(
                f"height and width must be {rule}, got {height} x {width}; the nearest valid size "
                f"is {near['height']} x {near['width']}"
            )
        if frames < 1 or (frames - 1) % self.frame_step:
            near_frames = max(0, round((frames - 1) / self.frame_step)) * self.frame_step + 1
            raise SettingError(
                f"frames must be a multiple of {self.frame_step} plus 1, got {frames}; "
                f"the nearest valid number is {near_frames}"
            )
        self._check_positions(height, width, frames)

    def _check_positions(self, height: int, width: int, frames: int) -> None:
        if self.positions is None:
            return
        t, h, w = self.patch
        along = {
            "frames": (frames, math.ceil(self.latent_frames(frames) / t), self.time * t),
            "height": (height, height // self.space // h, self.space * h),
            "width": (width, width // self.space // w, self.space * w),
        }
        for name, (value, tokens, each) in along.items():
            if tokens > self.positions:
                most = self.positions * each
                if name == "frames":
                    most = self.most_frames((self.positions * t - 1) * self.time + 1)
                raise SettingError(
                    f"this model knows {self.positions} positions along an axis, and {name} "
                    f"{value} needs {tokens}; ask for at most {most}"
                )


def _positions(config: Any, patch: tuple[int, int, int]) -> int | None:
    """Return the length of the model's table of positions, which a longer axis would leave."""
    if config.get("rope_max_seq_len"):
        return int(config["rope_max_seq_len"])
    if config.get("max_size"):
        return max(size // side for size, side in zip(config["max_size"], patch, strict=True))
    return None


def _factor(pipe: Any, *names: str) -> int:
    return next(int(getattr(pipe, name)) for name in names if hasattr(pipe, name))
