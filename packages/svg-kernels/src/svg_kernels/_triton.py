"""The portable GPU tier: the operations of `reference.py` in Triton, no compiler needed.

One tile per program, rows padded to a power of two and masked, fp32 arithmetic, 64-bit offsets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_kernels._tables import pair_views

_TILE = 4096  # elements of a tile, unless one row is longer


@triton.jit
def _rstd(square, count, eps):
    # `/` and `tl.sqrt` are approximate on NVIDIA GPUs, several units in the last place together.
    zero = tl.zeros_like(square)
    return tl.div_rn(zero + 1.0, tl.sqrt_rn(tl.div_rn(square, zero + count) + eps))


@triton.jit
def _norm(
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
    if CENTER:
        x = tl.where(mask, x - (tl.sum(x, 1) / width)[:, None], 0.0)
        x = tl.where(mask, x - (tl.sum(x, 1) / width)[:, None], 0.0)
    y = x * _rstd(tl.sum(x * x, 1), width, eps)[:, None]
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + column, column < width, 0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + column, column < width, 0.0).to(tl.float32)[None, :]
    if MODULATED:
        at = outer * scale_outer + within * scale_inner + column[None, :]
        y = y * (1.0 + tl.load(scale_ptr + at, mask, 0.0).to(tl.float32))
        at = outer * shift_outer + within * shift_inner + column[None, :]
        y = y + tl.load(shift_ptr + at, mask, 0.0).to(tl.float32)
    out = y_ptr + row[:, None] * width + column[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _gate(
    residual_ptr, x_ptr, gate_ptr, y_ptr, rows, inner, width,
    residual_outer, residual_inner, x_outer, x_inner, gate_outer, gate_inner,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def _rope(
    x_ptr, y_ptr, cos_ptr, sin_ptr, heads, tokens, pairs, start, length,
    xb, xh, xs, xd, yb, yh, ys, yd, tb, ts, td,
    first_step, second_offset,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // heads, place % heads
    token = tl.program_id(1).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    pair = tl.arange(0, BLOCK_P)
    mask = (token < tokens)[:, None] & (pair < pairs)[None, :]
    row = token - start
    turn = ((row >= 0) & (row < length))[:, None] & mask
    at = batch * tb + row[:, None] * ts + pair[None, :] * td
    c = tl.load(cos_ptr + at, turn, 1.0)
    s = tl.load(sin_ptr + at, turn, 0.0)
    x = x_ptr + batch * xb + head * xh + token[:, None] * xs + (pair * first_step * xd)[None, :]
    a = tl.load(x, mask, 0.0)
    b = tl.load(x + second_offset * xd, mask, 0.0)
    u, v = a.to(tl.float32), b.to(tl.float32)
    y = y_ptr + batch * yb + head * yh + token[:, None] * ys + (pair * first_step * yd)[None, :]
    tl.store(y, tl.where(turn, (u * c - v * s).to(a.dtype), a), mask)
    tl.store(y + second_offset * yd, tl.where(turn, (v * c + u * s).to(b.dtype), b), mask)


@triton.jit
def _qk(
    x_ptr, weight_ptr, y_ptr, cos_ptr, sin_ptr, heads, tokens, pairs, eps, start, length,
    xb, xs, yb, yh, ys, tb, ts, td, first_step, second_offset,
    ACROSS: tl.constexpr, ROTATE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    batch, token = place // tokens, place % tokens
    head = tl.arange(0, BLOCK_H)[:, None]
    pair = tl.arange(0, BLOCK_P)[None, :]
    mask = (head < heads) & (pair < pairs)
    column = head * (2 * pairs) + pair * first_step
    x = x_ptr + batch * xb + token * xs + column
    a = tl.load(x, mask, 0.0).to(tl.float32)
    b = tl.load(x + second_offset, mask, 0.0).to(tl.float32)
    square = tl.sum(a * a + b * b, 1)
    if ACROSS:
        rstd = _rstd(tl.sum(square, 0, keep_dims=True), heads * pairs * 2, eps)[:, None]
        w = weight_ptr + column
    else:
        rstd = _rstd(square, pairs * 2, eps)[:, None]
        w = weight_ptr + pair * first_step + head * 0
    a = a * rstd * tl.load(w, mask, 0.0).to(tl.float32)
    b = b * rstd * tl.load(w + second_offset, mask, 0.0).to(tl.float32)
    u, v = a, b
    if ROTATE:
        row = token - start
        turn = (row >= 0) & (row < length) & mask
        at = batch * tb + row * ts + pair * td + head * 0
        c = tl.load(cos_ptr + at, turn, 1.0)
        s = tl.load(sin_ptr + at, turn, 0.0)
        u = a * c - b * s
        v = b * c + a * s
    y = y_ptr + batch * yb + head.to(tl.int64) * yh + token * ys + pair * first_step
    tl.store(y, u.to(y_ptr.dtype.element_ty), mask)
    tl.store(y + second_offset, v.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _permute(
    x_ptr, y_ptr, order_ptr, heads, count, dim, xb, xh, xs, ob, oh, y_place,
    INVERSE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // heads, place % heads
    row = tl.program_id(1).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < count)[:, None] & (channel < dim)
    other = tl.load(order_ptr + batch * ob + head * oh + row, row < count, 0).to(tl.int64)
    source, target = (row, other) if INVERSE else (other, row)
    x = tl.load(x_ptr + batch * xb + head * xh + source[:, None] * xs + channel, mask)
    tl.store(y_ptr + place * y_place + target[:, None] * dim + channel, x, mask)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Launch `_norm` without centring; see `reference.rms_norm`."""
    return _launch_norm(x, weight, None, None, None, eps, out_dtype, False)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """Launch `_norm` with centring; see `reference.layer_norm`."""
    return _launch_norm(x, weight, bias, None, None, eps, out_dtype, True)


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch `_norm` with centring and modulation; see `reference.layer_norm_modulate`."""
    return _launch_norm(x, weight, bias, scale, shift, eps, out_dtype, True)


def _launch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    center: bool,
) -> Tensor:
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    width = x.shape[-1]
    rows3 = _last(x) if x.ndim == 3 else x.reshape(1, -1, width).contiguous()
    outer, inner = rows3.shape[:2]
    block_c = triton.next_power_of_2(width)
    block_r = max(1, min(64, _TILE // block_c))
    weight, bias, scale, shift = (
        None if t is None else _last(t) for t in (weight, bias, scale, shift)
    )
    _norm[(triton.cdiv(outer * inner, block_r),)](
        rows3, y, weight, bias, scale, shift,
        outer * inner, inner, width, eps,
        *rows3.stride()[:2], *_steps(scale), *_steps(shift),
        CENTER=center, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        MODULATED=scale is not None, BLOCK_R=block_r, BLOCK_C=block_c,
        num_warps=4 if block_c * block_r <= _TILE else 8 if block_c <= 8192 else 16,
    )  # fmt: skip
    return y


def gate_residual(residual: Tensor, x: Tensor, gate: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Launch `_gate`; see `reference.gate_residual`."""
    y = torch.empty(residual.shape, dtype=out_dtype, device=residual.device)
    if y.numel() == 0:
        return y
    outer, inner, width = residual.shape
    residual, x, gate = _last(residual), _last(x), _last(gate)
    block_c = min(1024, triton.next_power_of_2(width))
    block_r = max(1, 2048 // block_c)
    grid = (triton.cdiv(outer * inner, block_r), triton.cdiv(width, block_c))
    _gate[grid](
        residual, x, gate, y, outer * inner, inner, width,
        *residual.stride()[:2], *x.stride()[:2], *_steps(gate),
        BLOCK_R=block_r, BLOCK_C=block_c,
    )  # fmt: skip
    return y


def rope(
    xs: Sequence[Tensor],
    outs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor | None,
    half: bool,
    start: int,
) -> None:
    """Launch `_rope` for each tensor; see `reference.rope`."""
    cos, sin = _same_steps(*pair_views(cos, sin, xs[0].shape[3], half))
    for x, out in zip(xs, outs, strict=True):
        if x.numel() == 0:
            continue
        batch, heads, tokens, dim = x.shape
        block_p = triton.next_power_of_2(dim // 2)
        block_s = max(1, min(64, 2048 // block_p))
        _rope[(batch * heads, triton.cdiv(tokens, block_s))](
            x, out, cos, sin, heads, tokens, dim // 2, start, cos.shape[1],
            *x.stride(), *out.stride(), *_table_steps(cos), *_pair_steps(dim, half),
            BLOCK_S=block_s, BLOCK_P=block_p,
        )  # fmt: skip


def qk_norm_rope(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    half: bool,
    start: int,
) -> None:
    """Launch `_qk` for each tensor; see `reference.qk_norm_rope`."""
    steps, length = (0, 0, 0), 0
    if cos is not None:
        cos, sin = _same_steps(*pair_views(cos, sin, outs[0].shape[3], half))
        steps, length = _table_steps(cos), cos.shape[1]
    for x, weight, out in zip(xs, weights, outs, strict=True):
        if out.numel() == 0:
            continue
        batch, heads, tokens, dim = out.shape
        x = _last(x)
        block_h = triton.next_power_of_2(heads)
        block_p = triton.next_power_of_2(dim // 2)
        _qk[(batch * tokens,)](
            x, _last(weight), out, cos, sin, heads, tokens, dim // 2, eps, start, length,
            *x.stride()[:2], *out.stride()[:3], *steps, *_pair_steps(dim, half),
            ACROSS=weight.numel() != dim, ROTATE=length > 0, BLOCK_H=block_h, BLOCK_P=block_p,
            num_warps=4 if block_h * block_p <= _TILE // 2 else 8,
        )  # fmt: skip


def permute_rows(
    xs: Sequence[Tensor], orders: Sequence[Tensor], outs: Sequence[Tensor], inverse: bool
) -> None:
    """Launch `_permute` for each tensor; see `reference.permute_rows`."""
    for x, order, out in zip(xs, orders, outs, strict=True):
        if out.numel() == 0:
            continue
        x, order = _last(x), _last(order)
        batch, heads, count, dim = out.shape
        block_d = triton.next_power_of_2(dim)
        block_s = max(1, min(128, 8192 // block_d))
        _permute[(batch * heads, triton.cdiv(count, block_s))](
            x, out, order, heads, count, dim, *x.stride()[:3], *order.stride()[:2], count * dim,
            INVERSE=inverse, BLOCK_S=block_s, BLOCK_D=block_d,
        )  # fmt: skip


def _last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _steps(x: Tensor | None) -> tuple[int, int]:
    """Return the strides of a modulation along B and S, 0 along an axis of length 1."""
    if x is None:
        return 0, 0
    batch = x.stride(0) if x.shape[0] > 1 else 0
    return batch, x.stride(1) if x.ndim == 3 and x.shape[1] > 1 else 0


def _same_steps(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


def _table_steps(table: Tensor) -> tuple[int, int, int]:
    return table.stride(0) if table.shape[0] > 1 else 0, table.stride(1), table.stride(2)


def _pair_steps(dim: int, half: bool) -> tuple[int, int]:
    """Return the step between pairs and the offset from a pair's first channel to its second."""
    return (1, dim // 2) if half else (2, 1)
