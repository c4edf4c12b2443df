"""Dealing heads with Triton: one program, whose loop is over the heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_attention.planning.triton.launch import on


@triton.jit
def deal_kernel(cost, by_cost, order, heads, ranks, BLOCK_R: tl.constexpr):
    """Give each head in turn to the process that has least, of those with room."""
    offs = tl.arange(0, BLOCK_R)
    room = heads // ranks + (offs < heads % ranks).to(tl.int32)
    room = tl.where(offs < ranks, room, 0)
    first = tl.cumsum(room, 0) - room
    filled = tl.zeros([BLOCK_R], tl.int32)
    load = tl.zeros([BLOCK_R], tl.float32)
    for place in range(heads):
        head = tl.load(by_cost + place)
        least = tl.argmin(tl.where(filled < room, load, float("inf")), 0)
        taken = offs == least
        tl.store(order + tl.sum(tl.where(taken, first + filled, 0), 0), head)
        load += tl.where(taken, tl.load(cost + head), 0.0)
        filled += taken.to(tl.int32)


def deal_heads(cost: Tensor, by_cost: Tensor, ranks: int) -> Tensor:
    """Launch `deal_kernel`."""
    order = torch.empty_like(by_cost)
    if order.numel():
        with on(cost.device):
            deal_kernel[(1,)](
                cost.contiguous(),
                by_cost,
                order,
                len(cost),
                ranks,
                BLOCK_R=triton.next_power_of_2(ranks),
                num_warps=1,
            )
    return order
