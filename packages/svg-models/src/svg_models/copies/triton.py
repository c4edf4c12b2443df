"""Copies of strided rows by a few programs, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 64


@triton.jit(do_not_specialize=("tokens", "heads", "tiles"))
def copy_rows_kernel(
    y_ptr, x_ptr, order_ptr, tokens, heads, tiles, xb, xs, xh, yb, ys, yh,
    WIDTH: tl.constexpr, ORDERED: tl.constexpr, BY_TOKEN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy tiles of `BLOCK_S` rows of one head; programs take them in turns."""
    blocks = tl.cdiv(tokens, BLOCK_S)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        if BY_TOKEN:  # rows of all heads of a token lie side by side
            head, rest = tile % heads, tile // heads
            block, batch = rest % blocks, (rest // blocks).to(tl.int64)
        else:
            block, rest = tile % blocks, tile // blocks
            head, batch = rest % heads, (rest // heads).to(tl.int64)
        source = tl.load(order_ptr + head) if ORDERED else head.to(tl.int64)
        row = block.to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
        channel = tl.arange(0, BLOCK_D)[None, :]
        mask = (row < tokens)[:, None] & (channel < WIDTH)
        x = tl.load(x_ptr + batch * xb + source * xh + row[:, None] * xs + channel, mask)
        y = y_ptr + batch * yb + head.to(tl.int64) * yh + row[:, None] * ys
        tl.store(y + channel, x, mask)


def copy_rows(target: Tensor, source: Tensor, order: Tensor | None, programs: int) -> None:
    """Launch `copy_rows_kernel`; see `svg_models.copies`.

    Args:
        target: `[B, S, H, D]`, its last axis contiguous.
        source: as `target`; of any number of heads if they are chosen.
        order: int64 `[H]`, which heads of the source; None for all, in their order.
        programs: how many blocks of threads copy.
    """
    if target.numel() == 0:
        return
    y, x = _as_words(target, source)
    if order is None and y.shape[1] < y.shape[2]:  # tiles are of rows along the longer axis
        y, x = y.transpose(1, 2), x.transpose(1, 2)
    batch, tokens, heads, width = y.shape
    tiles = batch * heads * triton.cdiv(tokens, BLOCK_ROWS)
    strides = [t.stride(axis) for t in (x, y) for axis in (0, 1, 2)]
    with torch.cuda.device_of(x):
        copy_rows_kernel[(min(programs, tiles),)](
            y, x, x if order is None else order, tokens, heads, tiles, *strides,
            WIDTH=width, ORDERED=order is not None, BY_TOKEN=x.stride(2) < x.stride(1),
            BLOCK_S=BLOCK_ROWS, BLOCK_D=triton.next_power_of_2(width), num_warps=8,
        )  # fmt: skip


def _as_words(*tensors: Tensor) -> list[Tensor]:
    """Return tensors as views of the widest integers, of which threads load 16 bytes at a time."""
    for word in (torch.int64, torch.int32, torch.int16, torch.uint8):
        try:
            return [x.view(word) for x in tensors]
        except RuntimeError:  # a row, or where one begins, is no multiple of it
            continue
    raise ValueError(f"the last axis must be contiguous, got strides {tensors[0].stride()}")
