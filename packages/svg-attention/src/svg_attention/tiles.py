"""Tiles of query rows, and heads that share keys."""

from __future__ import annotations

from torch import Tensor

# Query rows of a tile, in every plan that a method builds.
TILE_ROWS = 128
# Key rows that a GPU's copy engine moves at once.
COPY_ROWS = 8


def count_tiles(length: int, tile_rows: int = TILE_ROWS) -> int:
    """Return how many tiles of `tile_rows` rows cover `length` rows."""
    return (length + tile_rows - 1) // tile_rows


def match_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat axis 1 of a grouped tensor so that it has one entry for each of `heads` heads.

    Raises:
        ValueError: if `heads` is not a multiple of what `x` has.
    """
    if x.shape[1] == heads:
        return x
    if x.shape[1] == 0 or heads % x.shape[1]:
        raise ValueError(f"{heads} query heads are not a multiple of {x.shape[1]} key heads")
    return x.repeat_interleave(heads // x.shape[1], dim=1)
