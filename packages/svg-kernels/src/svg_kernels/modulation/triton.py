"""Modulated LayerNorm and the gated residual in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_kernels._rows import contiguous_rows, modulation_strides
from svg_kernels.norm.triton import launch_norm


@triton.jit
def gate_residual_kernel(
    residual_ptr, x_ptr, gate_ptr, y_ptr, rows, inner, width,
    residual_outer, residual_inner, x_outer, x_inner, gate_outer, gate_inner,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute `residual + x * gate` for a block of rows and columns."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    outer, within = (row // inner)[:, None], (row % inner)[:, None]
    at = outer * residual_outer + within * residual_inner + column[None, :]
    y = tl.load(residual_ptr + at, mask, 0.0).to(tl.float32)
    x = tl.load(x_ptr + outer * x_outer + within * x_inner + column[None, :], mask, 0.0)
    at = outer * gate_outer + within * gate_inner + column[None, :]
    y += x.to(tl.float32) * tl.load(gate_ptr + at, mask, 0.0).to(tl.float32)
    out = y_ptr + row[:, None] * width + column[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask)


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch `norm_rows_kernel` with modulation; see `reference.layer_norm_modulate`."""
    z = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    launch_norm(x, z, weight=weight, bias=bias, scale=scale, shift=shift, eps=eps)
    return z


def gate_residual(residual: Tensor, x: Tensor, gate: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Launch `gate_residual_kernel`; see `reference.gate_residual`."""
    y = torch.empty(residual.shape, dtype=out_dtype, device=residual.device)
    if y.numel() == 0:
        return y
    outer, inner, width = residual.shape
    residual, x, gate = contiguous_rows(residual), contiguous_rows(x), contiguous_rows(gate)
    block_c = min(1024, triton.next_power_of_2(width))
    block_r = max(1, 2048 // block_c)
    grid = (triton.cdiv(outer * inner, block_r), triton.cdiv(width, block_c))
    gate_residual_kernel[grid](
        residual, x, gate, y, outer * inner, inner, width,
        *residual.stride()[:2], *x.stride()[:2], *modulation_strides(gate),
        BLOCK_R=block_r, BLOCK_C=block_c,
    )  # fmt: skip
    return y
