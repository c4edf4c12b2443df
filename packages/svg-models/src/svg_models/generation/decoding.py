"""Decode once more, in tiles, where memory ran out: no clip is lost in its last minute."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from svg_models.loading import Progress

__all__ = ["Decoding"]

# How many times as long as the VAE's own tiles are, tried one after the other. Long ones take less
# time, since less is decoded twice: HunyuanVideo's own decode a clip of 1280 x 720 nearly three
# times. Whether a kind fits shows in the first tile.
_FACTORS = (4, 2, 1)


class Decoding:
    """Inside a `with` block, has a pipeline's VAE decode in tiles what does not fit in memory.

    Afterwards the VAE is as it was found. One that has no tiles, or decodes in tiles already, fails
    as it does by itself.

    Args:
        pipe: the diffusers pipeline.
        progress: of the clip.

    Attributes:
        in_tiles: whether that was necessary.
    """

    def __init__(self, pipe: Any, progress: Progress) -> None:
        self._vae: Any = getattr(pipe, "vae", None)
        self._progress = progress
        self._own: Any = None
        self._lengths: dict[str, int] = {}
        self.in_tiles = False

    def __enter__(self) -> Decoding:
        vae = self._vae
        if vae is not None:
            self._own = vars(vae).get("decode")  # somebody else's, which stays
            self._plain = vae.decode
            vae.decode = self._decode
        return self

    def __exit__(self, *exception: object) -> None:
        vae = self._vae
        if vae is None:
            return
        if self.in_tiles:
            vae.disable_tiling()
            for name, length in self._lengths.items():
                setattr(vae, name, length)
        if vars(vae).get("decode") == self._decode:
            if self._own is None:
                del vae.decode
            else:
                vae.decode = self._own

    def _decode(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._plain(*args, **kwargs)
        except torch.OutOfMemoryError:
            if getattr(self._vae, "use_tiling", True):
                raise
        self.in_tiles = True
        self._lengths = _lengths(self._vae)
        factors = _FACTORS if self._lengths else (1,)
        for factor in factors:
            # Not in a handler, whose traceback keeps what the attempt before has allocated.
            torch.cuda.empty_cache()
            self._progress("decoding in tiles", 0, 0)
            self._vae.enable_tiling()
            self._lengthen(factor)
            try:
                out = self._plain(*args, **kwargs)
            except torch.OutOfMemoryError:
                if factor == factors[-1]:
                    raise
                continue
            self._say()
            return out

    def _lengthen(self, factor: int) -> None:
        """Make tiles so many times as long as they were, overlapping as far as they did."""
        for axis in ("height", "width"):
            names = f"tile_sample_min_{axis}", f"tile_sample_stride_{axis}"
            if names[0] in self._lengths:
                length, stride = (self._lengths[name] for name in names)
                setattr(self._vae, names[0], factor * length)
                setattr(self._vae, names[1], factor * length - (length - stride))

    def _say(self) -> None:
        sides = [
            getattr(self._vae, f"tile_sample_min_{axis}", None) for axis in ("width", "height")
        ]
        size = "" if None in sides else f" of {sides[0]} x {sides[1]} pixels"
        warnings.warn(
            "decoding the whole picture at once takes more memory than there is, so it was decoded "
            f"in tiles{size}, which are blended where they overlap",
            UserWarning,
            stacklevel=2,
        )


def _lengths(vae: Any) -> dict[str, int]:
    """Return lengths and strides of a VAE's tiles, by the names of its attributes; all, or none."""
    axes, kinds = ("height", "width"), ("min", "stride")
    found: dict[str, Any] = {
        name: getattr(vae, name, None)
        for name in (f"tile_sample_{kind}_{axis}" for kind in kinds for axis in axes)
    }
    return {} if None in found.values() else found
