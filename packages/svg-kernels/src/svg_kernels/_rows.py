"""How rows and modulation lie in memory, for the launchers of the GPU backends."""

from __future__ import annotations

from torch import Tensor


def contiguous_rows(x: Tensor) -> Tensor:
    """Return `x` if its last axis is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows_in_three(x: Tensor) -> Tensor:
    """Return the rows of `x` as `[B, S, C]`, contiguous along C; those of three axes stay there."""
    return contiguous_rows(x) if x.ndim == 3 else x.reshape(1, -1, x.shape[-1]).contiguous()


def modulation_strides(x: Tensor | None) -> tuple[int, int]:
    """Return the strides of a modulation along B and S, 0 along an axis of length 1."""
    if x is None:
        return 0, 0
    batch = x.stride(0) if x.shape[0] > 1 else 0
    return batch, x.stride(1) if x.ndim == 3 and x.shape[1] > 1 else 0
