"""A gated residual and its layer norm in Triton: a tile of whole rows per program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from svg_kernels._rows import contiguous_rows, modulation_strides
from svg_kernels.norm.triton import TILE_ELEMENTS, apply_rows, unit_rows, warps_for


@triton.jit
def gate_residual_norm_kernel(
    residual_ptr, x_ptr, gate_ptr, y_ptr, z_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    rows, inner, width, eps,
    residual_outer, residual_inner, x_outer, x_inner, gate_outer, gate_inner,
    scale_outer, scale_inner, shift_outer, shift_inner,
    HAS_GATE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    MODULATED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add `BLOCK_R` rows to the residual and normalize them."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    outer, within = (row // inner)[:, None], (row % inner)[:, None]
    at = outer * residual_outer + within * residual_inner + column[None, :]
    y = tl.load(residual_ptr + at, mask, 0.0).to(tl.float32)
    at = outer * x_outer + within * x_inner + column[None, :]
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    if HAS_GATE:
        at = outer * gate_outer + within * gate_inner + column[None, :]
        x = x * tl.load(gate_ptr + at, mask, 0.0).to(tl.float32)
    rounded = (y + x).to(y_ptr.dtype.element_ty)
    out = row[:, None] * width + column[None, :]
    tl.store(y_ptr + out, rounded, mask)
    z = unit_rows(rounded.to(tl.float32), mask, width, eps, True)
    z = apply_rows(
        z, column, mask, outer, within, width, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
        scale_outer, scale_inner, shift_outer, shift_inner, HAS_WEIGHT, HAS_BIAS, MODULATED,
    )  # fmt: skip
    tl.store(z_ptr + out, z.to(z_ptr.dtype.element_ty), mask)


def gate_residual_norm(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch `gate_residual_norm_kernel`; see `reference.gate_residual_norm`."""
    y, z = (residual.new_empty(residual.shape) for _ in range(2))
    if y.numel() == 0:
        return y, z
    outer, inner, width = residual.shape
    residual, x = contiguous_rows(residual), contiguous_rows(x)
    gate, weight, bias, scale, shift = (
        None if t is None else contiguous_rows(t) for t in (gate, weight, bias, scale, shift)
    )
    block_c = triton.next_power_of_2(width)
    block_r = max(1, min(64, TILE_ELEMENTS // block_c))
    gate_residual_norm_kernel[(triton.cdiv(outer * inner, block_r),)](
        residual, x, gate, y, z, weight, bias, scale, shift,
        outer * inner, inner, width, eps,
        *residual.stride()[:2], *x.stride()[:2], *modulation_strides(gate),
        *modulation_strides(scale), *modulation_strides(shift),
        HAS_GATE=gate is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        MODULATED=scale is not None, BLOCK_R=block_r, BLOCK_C=block_c,
        num_warps=warps_for(block_r, block_c),
    )  # fmt: skip
    return y, z
