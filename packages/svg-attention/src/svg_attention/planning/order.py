"""Ordering the tiles of a plan, so that none that reads much is started last."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_attention._ops import define_op
from svg_attention.planning.dispatch import select_planner

# Tiles that read more than this many times their head's mean are started first.
LONG_RATIO = 1.5


def long_tiles_first(
    run_lengths: Tensor, *, ratio: float = LONG_RATIO, backend: str = "auto"
) -> Tensor:
    """Order tiles head by head, those that read much more than their head's average first.

    A tile of text rows reads every key; started last, it would run on alone. The others keep
    their order: neighbours read similar keys, which are then still in the cache.

    Args:
        run_lengths: int32 `[B, H, T, R]`.
        ratio: tiles that read more than this many times their head's mean come first.
        backend: `"auto"`, `"triton"` or `"reference"`.

    Returns:
        int32 `[B * H * T]`, tile numbers in the order to start them.

    Raises:
        ValueError: if a shape does not fit.
        UnsupportedError: if `backend` cannot run on this device.
    """
    if run_lengths.ndim != 4:
        raise ValueError(f"run_lengths must be [B, H, T, R], got {list(run_lengths.shape)}")
    order: Tensor = _long_tiles_first(run_lengths, ratio, backend)
    return order


def _run_long_tiles(run_lengths: Tensor, ratio: float, backend: str) -> Tensor:
    rows = run_lengths.sum(dim=-1, dtype=torch.int32).flatten(0, 1)
    order: Tensor = select_planner(backend, run_lengths.device).long_tiles_first(rows, ratio)
    return order


def _fake_long_tiles(run_lengths: Tensor, ratio: float, backend: str) -> Tensor:
    return run_lengths.new_empty(run_lengths.shape[:3].numel(), dtype=torch.int32)


_long_tiles_first = define_op(
    "long_tiles_first",
    "(Tensor run_lengths, float ratio, str backend) -> Tensor",
    _run_long_tiles,
    _fake_long_tiles,
)
