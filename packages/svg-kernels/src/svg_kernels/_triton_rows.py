"""Rows in Triton: whole rows in registers, a wide one in pieces.

A tile must have a power of two of columns, and a row of 5,120 padded to 8,192 takes registers for
8,192 values: fewer rows are then on their way at once, and memory waits. Five pieces of 1,024 take
what the row has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

TILE_ELEMENTS = 4096  # of a tile of narrow rows
NARROW = 1024  # columns up to which several rows share a tile


@dataclass(frozen=True, kw_only=True)
class RowTile:
    """How a program holds rows: rows and columns of a piece, pieces, warps, registers a thread."""

    rows: int
    columns: int
    pieces: int
    warps: int
    registers: int | None = None

    def options(self) -> dict[str, Any]:
        """Return what a launch is given."""
        shape = {"BLOCK_R": self.rows, "BLOCK_C": self.columns, "PIECES": self.pieces}
        return shape | {"num_warps": self.warps, "maxnreg": self.registers}


def row_tile(width: int, packed: int) -> RowTile:
    """Return how a program holds rows of `width` values.

    Measured on an H200 at 5,120 and 13,824 columns, 2026-11-28. Eight values of a piece are in a
    thread, so that it loads 16 bytes of a 16-bit type at once.

    Args:
        width: values of a row.
        packed: pieces up to which a thread gets by with 64 registers, so that more of them run.
    """
    if width <= NARROW:
        columns = triton.next_power_of_2(width)
        return RowTile(rows=min(64, TILE_ELEMENTS // columns), columns=columns, pieces=1, warps=4)
    warps = 4 if width <= 6 * NARROW else 8 if width <= 16 * NARROW else 16
    columns = 256 * warps
    pieces = triton.cdiv(width, columns)
    return RowTile(
        rows=1,
        columns=columns,
        pieces=pieces,
        warps=warps,
        registers=64 if pieces <= packed else None,
    )


@triton.jit
def columns_of(piece: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the columns of a piece, `[1, BLOCK_C]`."""
    return piece * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]


@triton.jit
def sum_rows(pieces, PIECES: tl.constexpr):
    """Return the sum of each row."""
    total = pieces[0]
    for piece in tl.static_range(1, PIECES):
        total += pieces[piece]
    return tl.sum(total, 1)


@triton.jit
def store_quantised(
    pieces, row, rows, width, q_ptr, scale_ptr, largest,
    BLOCK_C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Store rows in e4m3, the largest value of each scaled to `largest`, and their scales."""
    # The maximum of a number and NaN is the number, so a row of NaN alone has the size of zeros.
    sizes = tl.abs(pieces[0].to(tl.float32))
    for piece in tl.static_range(1, PIECES):
        sizes = tl.maximum(sizes, tl.abs(pieces[piece].to(tl.float32)))
    size = tl.maximum(tl.max(sizes, 1), 1e-12)
    whole = tl.zeros_like(size) + largest
    tl.store(scale_ptr + row, tl.div_rn(size, whole), row < rows)
    factor = tl.div_rn(whole, size)[:, None]
    for piece in tl.static_range(PIECES):
        column = columns_of(piece, BLOCK_C)
        mask = (row < rows)[:, None] & (column < width)
        q = (pieces[piece].to(tl.float32) * factor).to(q_ptr.dtype.element_ty)
        tl.store(q_ptr + row[:, None] * width + column, q, mask)
