"""RMSNorm and LayerNorm in Triton: one tile of whole rows per program, padded to a power of two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_kernels._rows import contiguous_rows, modulation_strides

TILE_ELEMENTS = 4096  # of a tile, unless one row is longer


@triton.jit
def reciprocal_std(square, count, eps):
    """Return `1 / sqrt(square / count + eps)`, each step correctly rounded."""
    # `/` and `tl.sqrt` are approximate on NVIDIA GPUs, several units in the last place together.
    zero = tl.zeros_like(square)
    return tl.div_rn(zero + 1.0, tl.sqrt_rn(tl.div_rn(square, zero + count) + eps))


@triton.jit
def unit_rows(x, mask, width, eps, CENTER: tl.constexpr):
    """Scale fp32 rows to unit root mean square, shifted to mean 0 first if asked."""
    if CENTER:
        x = tl.where(mask, x - (tl.sum(x, 1) / width)[:, None], 0.0)
        x = tl.where(mask, x - (tl.sum(x, 1) / width)[:, None], 0.0)
    return x * reciprocal_std(tl.sum(x * x, 1), width, eps)[:, None]


@triton.jit
def apply_rows(
    y, column, mask, outer, within, width, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    scale_outer, scale_inner, shift_outer, shift_inner,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, MODULATED: tl.constexpr,
):  # fmt: skip
    """Apply weight and bias to rows of batch element `outer` and token `within`; modulate them."""
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + column, column < width, 0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + column, column < width, 0.0).to(tl.float32)[None, :]
    if MODULATED:
        at = outer * scale_outer + within * scale_inner + column[None, :]
        y = y * (1.0 + tl.load(scale_ptr + at, mask, 0.0).to(tl.float32))
        at = outer * shift_outer + within * shift_inner + column[None, :]
        y = y + tl.load(shift_ptr + at, mask, 0.0).to(tl.float32)
    return y


@triton.jit
def _normalize_rows(
    x_ptr, y_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    rows, inner, width, eps,
    x_outer, x_inner, scale_outer, scale_inner, shift_outer, shift_inner,
    CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, MODULATED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    outer, within = (row // inner)[:, None], (row % inner)[:, None]
    x = tl.load(x_ptr + outer * x_outer + within * x_inner + column[None, :], mask, 0.0)
    x = x.to(tl.float32)
    y = unit_rows(x, mask, width, eps, CENTER)
    y = apply_rows(
        y, column, mask, outer, within, width, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
        scale_outer, scale_inner, shift_outer, shift_inner, HAS_WEIGHT, HAS_BIAS, MODULATED,
    )  # fmt: skip
    out = y_ptr + row[:, None] * width + column[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def rms_norm_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    rows, inner, width, eps,
    x_outer, x_inner, scale_outer, scale_inner, shift_outer, shift_inner,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, MODULATED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Scale `BLOCK_R` rows to unit root mean square."""
    _normalize_rows(
        x_ptr, y_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
        rows, inner, width, eps,
        x_outer, x_inner, scale_outer, scale_inner, shift_outer, shift_inner,
        False, HAS_WEIGHT, HAS_BIAS, MODULATED, BLOCK_R, BLOCK_C,
    )  # fmt: skip


@triton.jit
def layer_norm_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    rows, inner, width, eps,
    x_outer, x_inner, scale_outer, scale_inner, shift_outer, shift_inner,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, MODULATED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Shift `BLOCK_R` rows to mean 0, scale them to variance 1, modulate them if asked."""
    _normalize_rows(
        x_ptr, y_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
        rows, inner, width, eps,
        x_outer, x_inner, scale_outer, scale_inner, shift_outer, shift_inner,
        True, HAS_WEIGHT, HAS_BIAS, MODULATED, BLOCK_R, BLOCK_C,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Launch `rms_norm_kernel`; see `reference.rms_norm`."""
    return launch_norm(x, weight, None, None, None, eps, out_dtype, False)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """Launch `layer_norm_kernel`; see `reference.layer_norm`."""
    return launch_norm(x, weight, bias, None, None, eps, out_dtype, True)


def launch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    center: bool,
) -> Tensor:
    """Launch one of the kernels; scale and shift are those of `layer_norm_modulate`."""
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    width = x.shape[-1]
    rows3 = contiguous_rows(x) if x.ndim == 3 else x.reshape(1, -1, width).contiguous()
    outer, inner = rows3.shape[:2]
    block_c = triton.next_power_of_2(width)
    block_r = max(1, min(64, TILE_ELEMENTS // block_c))
    weight, bias, scale, shift = (
        None if t is None else contiguous_rows(t) for t in (weight, bias, scale, shift)
    )
    kernel = layer_norm_kernel if center else rms_norm_kernel
    kernel[(triton.cdiv(outer * inner, block_r),)](
        rows3, y, weight, bias, scale, shift,
        outer * inner, inner, width, eps,
        *rows3.stride()[:2], *modulation_strides(scale), *modulation_strides(shift),
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        MODULATED=scale is not None, BLOCK_R=block_r, BLOCK_C=block_c,
        num_warps=warps_for(block_r, block_c),
    )  # fmt: skip
    return y


def warps_for(block_r: int, block_c: int) -> int:
    """Return the warps of a program that holds a tile of rows."""
    return 4 if block_c * block_r <= TILE_ELEMENTS else 8 if block_c <= 8192 else 16
