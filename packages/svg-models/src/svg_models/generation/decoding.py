"""Decode once more, in tiles, where memory ran out: no clip is lost in its last minute."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from svg_models.loading import Progress

__all__ = ["Decoding"]


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
        if vars(vae).get("decode") == self._decode:
            if self._own is None:
                del vae.decode
            else:
                vae.decode = self._own

    def _decode(self, *args: Any, **kwargs: Any) -> Any:
        vae = self._vae
        try:
            return self._plain(*args, **kwargs)
        except torch.OutOfMemoryError:
            if getattr(vae, "use_tiling", True):
                raise
        # Not in the handler, whose traceback keeps what the first attempt has allocated.
        torch.cuda.empty_cache()
        vae.enable_tiling()
        self.in_tiles = True
        warnings.warn(
            "decoding the whole picture at once takes more memory than there is, so it is decoded "
            "in tiles, which are blended where they overlap",
            UserWarning,
            stacklevel=2,
        )
        self._progress("decoding in tiles", 0, 0)
        return self._plain(*args, **kwargs)
