"""Decode once more, in tiles, where memory ran out: no clip is lost in its last minute."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from svg_models.loading import Progress
from svg_models.stand_in import standing_in

__all__ = ["Decoding", "warn_if_unlike"]

# How many times as long as the VAE's own tiles are, tried one after the other. Long ones take less
# time, since less is decoded twice: HunyuanVideo's own decode a clip of 1280 x 720 nearly three
# times. Whether a kind fits shows in the first tile.
_FACTORS = (4, 2, 1)
_AT_ONCE = 0  # or in tiles that somebody else has asked for

# What a call that fails leaves in some VAEs, and the next one would take for its own.
_CLEARS = ("clear_cache", "_clear_conv_cache")

# By VAE and by size of its clips what fitted last, so that further clips begin with that.
_known: WeakKeyDictionary[Any, dict[tuple[int, int], int]] = WeakKeyDictionary()


class Decoding:
    """Inside a `with` block, has a pipeline's VAE decode in tiles what does not fit in memory.

    Before that it tries once more with less in memory. A VAE that has no tiles, or decodes in tiles
    already, is left to that. Between two calls, and afterwards, the VAE is as it was found.

    Args:
        pipe: the diffusers pipeline.
        width: of its clips, in pixels.
        height: of its clips, in pixels.
        release: frees what is not needed to decode.
        progress: of the clip.

    Attributes:
        tiles: how large those were that had to be; empty if there were none.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        width: int,
        height: int,
        release: Callable[[], None],
        progress: Progress,
    ) -> None:
        vae = getattr(pipe, "vae", None)
        self._vae: Any = getattr(vae, "_orig_mod", vae)  # without the wrapper of a compiler
        self._size, self._release, self._progress = (width, height), release, progress
        self._undo = ExitStack()
        self.tiles = ""

    def __enter__(self) -> Decoding:
        if self._vae is not None:
            self._plain = self._vae.decode
            self._undo.enter_context(standing_in(self._vae, "decode", self._decode))
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def _decode(self, *args: Any, **kwargs: Any) -> Any:
        known = _known.setdefault(self._vae, {})
        tiled = getattr(self._vae, "use_tiling", False)
        first = _AT_ONCE if tiled else known.get(self._size, _AT_ONCE)
        again = [_AT_ONCE] if first == _AT_ONCE else []
        tiles = [n for n in self._factors() if first == _AT_ONCE or n < first]
        problem = ""
        for number, factor in enumerate([first, *again, *tiles]):
            # Not in the handler, whose traceback keeps what the call before has allocated.
            if number:
                self._clear()
                self._release()
                torch.cuda.empty_cache()
            try:
                with self._in_tiles(factor):
                    out = self._plain(*args, **kwargs)
            except torch.OutOfMemoryError as error:
                problem = str(error)
                continue
            if factor != _AT_ONCE:
                self._note(factor, told=self._size in known)
                known[self._size] = factor
            return out
        self._clear()
        raise torch.OutOfMemoryError(problem)

    def _factors(self) -> list[int]:
        """Return by what the VAE's tiles can be multiplied and be smaller than the clip."""
        vae, sides = self._vae, self._sides()
        if getattr(vae, "use_tiling", True) or not hasattr(vae, "tiled_decode"):
            return []
        factors = _FACTORS if _strides(vae) else (1,)
        if sides is None:
            return list(factors)
        pairs = list(zip(sides, self._size, strict=True))
        return [factor for factor in factors if any(factor * n < side for n, side in pairs)]

    def _sides(self) -> tuple[int, int] | None:
        """Return width and height of the VAE's own tiles, if it tells."""
        width = getattr(self._vae, "tile_sample_min_width", None)
        height = getattr(self._vae, "tile_sample_min_height", None)
        return None if width is None or height is None else (int(width), int(height))

    @contextmanager
    def _in_tiles(self, factor: int) -> Iterator[None]:
        """Let the VAE decode in tiles so many times as long as its own, which overlap as far."""
        if factor == _AT_ONCE:
            yield
            return
        vae = self._vae
        before = {name: x for name, x in vars(vae).items() if name.startswith(("use_", "tile_"))}
        self._progress("decoding in tiles", 0, 0)
        try:
            vae.enable_tiling()
            for length, stride in _strides(vae):
                own = before[length]
                setattr(vae, length, factor * own)
                setattr(vae, stride, factor * own - (own - before[stride]))
            yield
        finally:
            for name, x in before.items():
                setattr(vae, name, x)

    def _note(self, factor: int, *, told: bool) -> None:
        sides = self._sides()
        self.tiles = "some" if sides is None else f"{factor * sides[0]} x {factor * sides[1]}"
        if told:
            return
        size = "" if sides is None else f" of {self.tiles} pixels"
        warnings.warn(
            "decoding the whole picture at once takes more memory than there is, so it is decoded "
            f"in tiles{size}, which are blended where they overlap",
            UserWarning,
            stacklevel=2,
        )

    def _clear(self) -> None:
        for name in _CLEARS:
            clear = getattr(self._vae, name, None)
            if callable(clear):
                clear()


def warn_if_unlike(tiles: str, dense: str) -> None:
    """Warn that a clip and the dense one that it is compared with were decoded in other tiles.

    Args:
        tiles: `Decoding.tiles` of the clip.
        dense: of the dense one.
    """
    if tiles != dense:
        ways = [f"in tiles ({one} pixels)" if one else "at once" for one in (tiles, dense)]
        warnings.warn(
            f"for lack of memory the sparse clip was decoded {ways[0]}, the dense one {ways[1]}, "
            "and what is measured between them includes that; take a smaller size, or --offload",
            UserWarning,
            stacklevel=3,
        )


def _strides(vae: Any) -> list[tuple[str, str]]:
    """Return the names of a VAE's attributes for the length of tiles and their strides, if any."""
    axes = ("height", "width")
    names = [(f"tile_sample_min_{axis}", f"tile_sample_stride_{axis}") for axis in axes]
    return names if all(name in vars(vae) for pair in names for name in pair) else []
