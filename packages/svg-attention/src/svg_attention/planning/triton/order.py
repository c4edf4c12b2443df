"""Ordering tiles with Triton: one program per head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_attention.planning.triton.launch import on


@triton.jit
def order_kernel(rows, order, tiles, ratio, BLOCK_T: tl.constexpr):
    """Order the tiles of one head: those of more than `ratio` times the mean first."""
    sequence = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_T)
    inside = offs < tiles
    read = tl.load(rows + sequence * tiles + offs, mask=inside, other=0).to(tl.float32)
    long = inside & (read > ratio * (tl.sum(read, 0) / tiles))
    ahead = tl.cumsum(long.to(tl.int32), 0)
    place = tl.where(long, ahead - 1, tl.sum(long.to(tl.int32), 0) + offs - ahead)
    tl.store(order + sequence * tiles + place, (sequence * tiles + offs).to(tl.int32), mask=inside)


def long_tiles_first(rows: Tensor, ratio: float) -> Tensor:
    """Launch `order_kernel`."""
    sequences, tiles = rows.shape
    order = torch.empty(rows.numel(), dtype=torch.int32, device=rows.device)
    if order.numel():
        with on(rows.device):
            order_kernel[(sequences,)](
                rows.contiguous(),
                order,
                tiles,
                ratio,
                BLOCK_T=triton.next_power_of_2(tiles),
                num_warps=4,
            )
    return order
