"""Tiles of query rows, and heads that share keys."""

from __future__ import annotations

from collections.abc import Iterator

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


def head_groups(
    batch: int, heads: int, key_heads: int, head_bytes: int, limit: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Split a call into parts that each need at most `limit` bytes, or hold a single key head.

    Args:
        batch: batch items.
        heads: query heads.
        key_heads: key heads, each of which `heads / key_heads` query heads share.
        head_bytes: what a key head of a batch item needs.
        limit: bytes.

    Yields:
        `(batch items, query heads, key heads)`; everything at once where it fits.
    """
    if batch * key_heads * head_bytes <= limit:
        yield slice(0, batch), slice(0, heads), slice(0, key_heads)
        return
    group = heads // key_heads
    step = -(-key_heads // -(-key_heads * head_bytes // limit))
    for b in range(batch):
        for first in range(0, key_heads, step):
            last = min(first + step, key_heads)
            yield slice(b, b + 1), slice(first * group, last * group), slice(first, last)
