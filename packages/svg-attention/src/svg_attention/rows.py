"""Moving rows of `[B, H, S, D]` tensors by per-head permutations."""

from __future__ import annotations

import torch
from torch import Tensor

PACKED = torch.contiguous_format


def flat_index(order: Tensor, length: int) -> Tensor:
    """Return int64 row numbers over all heads from row numbers `[B, H, N]` within each."""
    batch, heads = order.shape[:2]
    base = torch.arange(batch * heads, device=order.device) * length
    return order.long() + base.view(batch, heads, 1)


def take_rows(x: Tensor, order: Tensor) -> Tensor:
    """Return `y[b, h, i] = x[b, h, order[b, h, i]]`.

    Args:
        x: `[B, H, S, D]`.
        order: integers `[B, H, N]` below `S`.
    """
    batch, heads, length, width = x.shape
    rows = x.reshape(-1, width).index_select(0, flat_index(order, length).view(-1))
    return rows.view(batch, heads, -1, width)


def put_rows(x: Tensor, order: Tensor, out: Tensor | None = None) -> Tensor:
    """Undo `take_rows` for a permutation: `y[b, h, order[b, h, i]] = x[b, h, i]`.

    Args:
        x: `[B, H, S]` or `[B, H, S, D]`.
        order: integers `[B, H, S]`, a permutation for each head.
        out: where to put them; shaped and typed as `x`, any strides.
    """
    direct = out is not None and out.is_contiguous()
    target = out if out is not None and direct else torch.empty_like(x, memory_format=PACKED)
    flat = target.view(-1, *x.shape[3:])
    flat.index_copy_(0, flat_index(order, x.shape[2]).view(-1), x.reshape(-1, *x.shape[3:]))
    return target if out is None or direct else out.copy_(target)
