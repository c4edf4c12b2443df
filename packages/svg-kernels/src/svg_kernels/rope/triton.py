"""Rotary embedding in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from svg_kernels.rope.tables import pair_views


@triton.jit
def rope_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, heads, tokens, pairs, start, length,
    xb, xh, xs, xd, yb, yh, ys, yd, tb, ts, td,
    first_step, second_offset,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Rotate `BLOCK_S` tokens of one head."""
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


def rope(
    xs: Sequence[Tensor],
    outs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor | None,
    half: bool,
    start: int,
) -> None:
    """Launch `rope_kernel` for each tensor; see `reference.rope`."""
    cos, sin = same_strides(*pair_views(cos, sin, xs[0].shape[3], half))
    for x, out in zip(xs, outs, strict=True):
        if x.numel() == 0:
            continue
        batch, heads, tokens, dim = x.shape
        block_p = triton.next_power_of_2(dim // 2)
        block_s = max(1, min(64, 2048 // block_p))
        rope_kernel[(batch * heads, triton.cdiv(tokens, block_s))](
            x, out, cos, sin, heads, tokens, dim // 2, start, cos.shape[1],
            *x.stride(), *out.stride(), *table_strides(cos), *pair_steps(dim, half),
            BLOCK_S=block_s, BLOCK_P=block_p,
        )  # fmt: skip


def same_strides(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tables with equal strides."""
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


def table_strides(table: Tensor) -> tuple[int, int, int]:
    """Return the strides of batch, token and pair, 0 along a batch of one."""
    return table.stride(0) if table.shape[0] > 1 else 0, table.stride(1), table.stride(2)


def pair_steps(dim: int, half: bool) -> tuple[int, int]:
    """Return the step between pairs and the offset from a pair's first channel to its second."""
    return (1, dim // 2) if half else (2, 1)
