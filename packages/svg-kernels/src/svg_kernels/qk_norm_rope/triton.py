"""Norm, rotation and layout of queries and keys in Triton: a program per token."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from svg_kernels._rows import contiguous_rows
from svg_kernels._triton_rows import TILE_ELEMENTS
from svg_kernels.norm.triton import reciprocal_std
from svg_kernels.rope.tables import pair_views
from svg_kernels.rope.triton import pair_steps, same_strides, table_strides


@triton.jit
def qk_norm_rope_kernel(
    x_ptr, weight_ptr, y_ptr, cos_ptr, sin_ptr, heads, tokens, pairs, eps, start, length,
    xb, xs, yb, yh, ys, tb, ts, td, first_step, second_offset,
    ACROSS: tl.constexpr, ROTATE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Normalize, rotate and lay out all heads of one token."""
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
        rstd = reciprocal_std(tl.sum(square, 0, keep_dims=True), heads * pairs * 2, eps)[:, None]
        w = weight_ptr + column
    else:
        rstd = reciprocal_std(square, pairs * 2, eps)[:, None]
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
    """Launch `qk_norm_rope_kernel` for each tensor; see `reference.qk_norm_rope`."""
    steps, length = (0, 0, 0), 0
    if cos is not None:
        cos, sin = same_strides(*pair_views(cos, sin, outs[0].shape[3], half))
        steps, length = table_strides(cos), cos.shape[1]
    for x, weight, out in zip(xs, weights, outs, strict=True):
        if out.numel() == 0:
            continue
        batch, heads, tokens, dim = out.shape
        x = contiguous_rows(x)
        block_h = triton.next_power_of_2(heads)
        block_p = triton.next_power_of_2(dim // 2)
        qk_norm_rope_kernel[(batch * tokens,)](
            x, contiguous_rows(weight), out, cos, sin, heads, tokens, dim // 2, eps, start, length,
            *x.stride()[:2], *out.stride()[:3], *steps, *pair_steps(dim, half),
            ACROSS=weight.numel() != dim, ROTATE=length > 0, BLOCK_H=block_h, BLOCK_P=block_p,
            num_warps=4 if block_h * block_p <= TILE_ELEMENTS // 2 else 8,
        )  # fmt: skip
