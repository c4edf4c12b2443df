"""The permutation of rows in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from svg_kernels._rows import contiguous_rows


@triton.jit
def permute_rows_kernel(
    x_ptr, y_ptr, order_ptr, heads, count, dim, xb, xh, xs, ob, oh, y_place,
    INVERSE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gather, or with INVERSE scatter, `BLOCK_S` rows of one head."""
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // heads, place % heads
    row = tl.program_id(1).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < count)[:, None] & (channel < dim)
    other = tl.load(order_ptr + batch * ob + head * oh + row, row < count, 0).to(tl.int64)
    source, target = (row, other) if INVERSE else (other, row)
    x = tl.load(x_ptr + batch * xb + head * xh + source[:, None] * xs + channel, mask)
    tl.store(y_ptr + place * y_place + target[:, None] * dim + channel, x, mask)


def permute_rows(
    xs: Sequence[Tensor], orders: Sequence[Tensor], outs: Sequence[Tensor], inverse: bool
) -> None:
    """Launch `permute_rows_kernel` for each tensor; see `reference.permute_rows`."""
    for x, order, out in zip(xs, orders, outs, strict=True):
        if out.numel() == 0:
            continue
        x, order = contiguous_rows(x), contiguous_rows(order)
        batch, heads, count, dim = out.shape
        block_d = triton.next_power_of_2(dim)
        block_s = max(1, min(128, 8192 // block_d))
        permute_rows_kernel[(batch * heads, triton.cdiv(count, block_s))](
            x, out, order, heads, count, dim, *x.stride()[:3], *order.stride()[:2], count * dim,
            INVERSE=inverse, BLOCK_S=block_s, BLOCK_D=block_d,
        )  # fmt: skip
