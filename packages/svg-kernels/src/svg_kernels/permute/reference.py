"""The permutation of rows in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def permute_rows(
    xs: Sequence[Tensor], orders: Sequence[Tensor], outs: Sequence[Tensor], inverse: bool
) -> None:
    """Gather rows of `[B, H, S, D]` by `orders`, or scatter them back."""
    for x, order, out in zip(xs, orders, outs, strict=True):
        index = order.long()[..., None].expand(*order.shape, x.shape[-1])
        if inverse:
            out.scatter_(2, index, x)
        else:
            out.copy_(x.gather(2, index))
