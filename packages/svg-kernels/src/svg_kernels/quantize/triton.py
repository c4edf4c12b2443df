"""Rows in fp8 in Triton: a program reads a row, keeps it in registers, and writes it once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from svg_kernels._rows import rows_in_three
from svg_kernels._triton_rows import columns_of, row_tile, store_quantised
from svg_kernels.gelu.triton import activate
from svg_kernels.quantize import empty_rows


@triton.jit
def quantize_rows_kernel(
    x_ptr, q_ptr, scale_ptr,
    rows, inner, width, x_outer, x_inner, largest,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Quantise `BLOCK_R` rows of `width` values, the largest of each to `largest`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (row < rows)[:, None]
    x_ptr += (row // inner)[:, None] * x_outer + (row % inner)[:, None] * x_inner
    pieces = ()
    for piece in tl.static_range(PIECES):
        column = columns_of(piece, BLOCK_C)
        y = tl.load(x_ptr + column, inside & (column < width), 0.0).to(tl.float32)
        if ACTIVATION != "none":
            y = activate(y, ACTIVATION == "gelu_tanh", True)
        pieces = pieces + (y,)
    store_quantised(pieces, row, rows, width, q_ptr, scale_ptr, largest, BLOCK_C, PIECES)


def quantize_rows(x: Tensor, activation: str, largest: float) -> tuple[Tensor, Tensor]:
    """Launch `quantize_rows_kernel`; see `reference.quantize_rows`."""
    q, scale = empty_rows(x)
    if q.numel() == 0:
        return q, scale
    width = x.shape[-1]
    rows3 = rows_in_three(x)
    outer, inner = rows3.shape[:2]
    tile = row_tile(width, packed=7)
    quantize_rows_kernel[(triton.cdiv(outer * inner, tile.rows),)](
        rows3, q, scale,
        outer * inner, inner, width, *rows3.stride()[:2], largest,
        ACTIVATION=activation, **tile.options(),
    )  # fmt: skip
    return q, scale
