"""Norms in Triton, with what a transformer block does before and after one, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_kernels._rows import contiguous_rows, modulation_strides, rows_in_three
from svg_kernels._triton_rows import columns_of, row_tile, store_quantised, sum_rows


@triton.jit
def reciprocal_std(square, count, eps):
    """Return `1 / sqrt(square / count + eps)`, each step correctly rounded."""
    # `/` and `tl.sqrt` are approximate on NVIDIA GPUs, several units in the last place together.
    zero = tl.zeros_like(square)
    return tl.div_rn(zero + 1.0, tl.sqrt_rn(tl.div_rn(square, zero + count) + eps))


@triton.jit
def centre_rows(pieces, inside, width, BLOCK_C: tl.constexpr, PIECES: tl.constexpr):
    """Shift fp32 rows to mean 0."""
    total = sum_rows(pieces, PIECES)
    # Of a row of one 16-bit value exactly that value, as nothing takes a rest away after it.
    mean = tl.div_rn(total, tl.zeros_like(total) + width)[:, None]
    centred = ()
    for piece in tl.static_range(PIECES):
        mask = inside & (columns_of(piece, BLOCK_C) < width)
        centred = centred + (tl.where(mask, pieces[piece] - mean, 0.0),)
    return centred


@triton.jit
def norm_rows_kernel(
    x_ptr, added_ptr, gate_ptr, y_ptr, z_ptr, z_scale_ptr, weight_ptr, bias_ptr, scale_ptr,
    shift_ptr, rows, inner, width, eps, largest,
    x_outer, x_inner, added_outer, added_inner, gate_outer, gate_inner,
    scale_outer, scale_inner, shift_outer, shift_inner,
    ADDED: tl.constexpr, GATED: tl.constexpr, CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, MODULATED: tl.constexpr, QUANTISED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Normalize `BLOCK_R` rows; add to them before, modulate and quantise them after, if asked.

    `y` is the sum as it was rounded, `z` the norm of it. In e4m3, `z` is rounded to the dtype of
    `x` before, as if it had been written in between.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    outer, within = (row // inner)[:, None], (row % inner)[:, None]
    inside = (row < rows)[:, None]
    x_ptr += outer * x_outer + within * x_inner
    out = row[:, None] * width
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pieces = ()
    for piece in tl.static_range(PIECES):
        column = columns_of(piece, BLOCK_C)
        mask = inside & (column < width)
        x = tl.load(x_ptr + column, mask, 0.0).to(tl.float32)
        if ADDED:
            at = outer * added_outer + within * added_inner + column
            added = tl.load(added_ptr + at, mask, 0.0).to(tl.float32)
            if GATED:
                at = outer * gate_outer + within * gate_inner + column
                added = added * tl.load(gate_ptr + at, mask, 0.0).to(tl.float32)
            y = (x + added).to(dtype)
            tl.store(y_ptr + out + column, y, mask)
            x = y.to(tl.float32)
        pieces = pieces + (x,)
    if CENTER:
        pieces = centre_rows(pieces, inside, width, BLOCK_C, PIECES)
        if dtype == tl.float32:  # rounding leaves something of a mean that is large for 16 bits
            pieces = centre_rows(pieces, inside, width, BLOCK_C, PIECES)
    squares = pieces[0] * pieces[0]
    for piece in tl.static_range(1, PIECES):
        squares += pieces[piece] * pieces[piece]
    rstd = reciprocal_std(tl.sum(squares, 1), width, eps)[:, None]
    done = ()
    for piece in tl.static_range(PIECES):
        column = columns_of(piece, BLOCK_C)
        mask = inside & (column < width)
        z = pieces[piece] * rstd
        if HAS_WEIGHT:
            z = z * tl.load(weight_ptr + column, column < width, 0.0).to(tl.float32)
        if HAS_BIAS:
            z = z + tl.load(bias_ptr + column, column < width, 0.0).to(tl.float32)
        if MODULATED:
            at = outer * scale_outer + within * scale_inner + column
            z = z * (1.0 + tl.load(scale_ptr + at, mask, 0.0).to(tl.float32))
            at = outer * shift_outer + within * shift_inner + column
            z = z + tl.load(shift_ptr + at, mask, 0.0).to(tl.float32)
        if QUANTISED:
            done = done + (z.to(dtype),)
        else:
            tl.store(z_ptr + out + column, z.to(z_ptr.dtype.element_ty), mask)
    if QUANTISED:
        store_quantised(done, row, rows, width, z_ptr, z_scale_ptr, largest, BLOCK_C, PIECES)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Launch `norm_rows_kernel` without centring; see `reference.rms_norm`."""
    z = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    launch_norm(x, z, weight=weight, eps=eps, center=False)
    return z


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """Launch `norm_rows_kernel`; see `reference.layer_norm`."""
    z = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    launch_norm(x, z, weight=weight, bias=bias, eps=eps)
    return z


def launch_norm(
    x: Tensor,
    z: Tensor,
    *,
    added: Tensor | None = None,
    gate: Tensor | None = None,
    y: Tensor | None = None,
    z_scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float,
    center: bool = True,
    largest: float = 1.0,
) -> None:
    """Launch `norm_rows_kernel`.

    Args:
        x: `[..., C]`; `[B, S, C]` where anything else has rows.
        z: where the norm is written, contiguous; e4m3 together with `z_scale`, `[..., 1]`.
        added: `[B, S, C]`, added to `x` before; the sum is written to `y`.
        gate: a factor of what is added, as `scale` and `shift` are of the norm, `[B, C]` or
            `[B or 1, S or 1, C]`.
        y: contiguous, in the dtype of `x`.
        z_scale: contiguous, fp32.
        weight: `[C]`.
        bias: `[C]`.
        scale: see `gate`; goes with `shift`.
        shift: see `gate`.
        eps: added to the mean square.
        center: shift rows to mean 0 first.
        largest: what the largest value of a quantised row becomes.
    """
    if z.numel() == 0:
        return
    width = x.shape[-1]
    rows = rows_in_three(x)
    outer, inner = rows.shape[:2]
    added, gate, weight, bias, scale, shift = (
        None if t is None else contiguous_rows(t) for t in (added, gate, weight, bias, scale, shift)
    )
    tile = row_tile(width, packed=5)
    norm_rows_kernel[(triton.cdiv(outer * inner, tile.rows),)](
        rows, added, gate, y, z, z_scale, weight, bias, scale, shift,
        outer * inner, inner, width, eps, largest,
        *rows.stride()[:2], *((0, 0) if added is None else added.stride()[:2]),
        *modulation_strides(gate), *modulation_strides(scale), *modulation_strides(shift),
        ADDED=added is not None, GATED=gate is not None, CENTER=center,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, MODULATED=scale is not None,
        QUANTISED=z_scale is not None, **tile.options(),
    )  # fmt: skip
