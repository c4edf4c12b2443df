"""Rows in fp8 in Triton: a program reads a row, keeps it in registers, and writes it once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_kernels._rows import contiguous_rows
from svg_kernels.gelu.triton import activate

TILE_ELEMENTS = 4096  # of a tile, unless one row is longer


@triton.jit
def quantize_rows_kernel(
    x_ptr, q_ptr, scale_ptr,
    rows, inner, width, x_outer, x_inner, largest,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Quantise `BLOCK_R` rows of `width` values, the largest of each to `largest`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    at = (row // inner)[:, None] * x_outer + (row % inner)[:, None] * x_inner + column[None, :]
    y = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    if ACTIVATION != "none":
        y = activate(y, ACTIVATION == "gelu_tanh")
    size = tl.abs(y)
    size = tl.maximum(tl.max(tl.where(size == size, size, 0.0), 1), 1e-12)
    whole = tl.zeros_like(size) + largest
    tl.store(scale_ptr + row, tl.div_rn(size, whole), row < rows)
    q = y * tl.div_rn(whole, size)[:, None]
    tl.store(q_ptr + row[:, None] * width + column[None, :], q.to(q_ptr.dtype.element_ty), mask)


def quantize_rows(x: Tensor, activation: str, largest: float) -> tuple[Tensor, Tensor]:
    """Launch `quantize_rows_kernel`; see `reference.quantize_rows`."""
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if q.numel() == 0:
        return q, scale
    width = x.shape[-1]
    rows3 = contiguous_rows(x) if x.ndim == 3 else x.reshape(1, -1, width).contiguous()
    outer, inner = rows3.shape[:2]
    block_c = triton.next_power_of_2(width)
    block_r = max(1, min(64, TILE_ELEMENTS // block_c))
    quantize_rows_kernel[(triton.cdiv(outer * inner, block_r),)](
        rows3, q, scale,
        outer * inner, inner, width, *rows3.stride()[:2], largest,
        ACTIVATION=activation, BLOCK_R=block_r, BLOCK_C=block_c,
        num_warps=4 if block_c * block_r <= TILE_ELEMENTS else 8 if block_c <= 8192 else 16,
    )  # fmt: skip
    return q, scale
