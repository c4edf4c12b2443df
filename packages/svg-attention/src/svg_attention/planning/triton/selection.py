"""Selecting clusters with Triton: one program per tile of queries, no sort.

What is kept is decided by a threshold on the priority, found by bisection on the bits of the
floating-point numbers (which rank like the numbers, none being negative); clusters that are equal
to the threshold are settled by a running sum in the order of their numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_attention.planning.triton.launch import on


@triton.jit
def take(bits, weight, room, STRICT: tl.constexpr):
    """Take candidates in descending `bits` while they fit; return which. What is not one has -2.

    A candidate is taken if the weights before it are less than `room` (`STRICT`), or if the weights
    up to and with it are at most `room`.
    """
    low = -2
    high = 0x7F800000
    for _ in range(32):
        middle = low + (high - low) // 2
        above = tl.sum(tl.where(bits > middle, weight, 0.0), 0)
        if STRICT:
            fits = above < room
        else:
            fits = above <= room
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle)
    above = tl.sum(tl.where(bits > high, weight, 0.0), 0)
    tied = (bits == high) & (bits > -2)
    share = tl.where(tied, weight, 0.0)
    running = above + tl.cumsum(share, 0)
    if STRICT:
        tied = tied & (running - share < room)
    else:
        tied = tied & (running <= room)
    return (bits > high) | tied


@triton.jit
def fill(bits, keys, sizes, offs_c, spare):
    """Take, one by one, the best clusters of at most `spare` keys while they fit.

    What is left of a budget holds few clusters, so this ends sooner than another bisection.
    Returns `bits` with -3 for what was taken.
    """
    rest = tl.where(keys <= spare, bits, -2)
    best = tl.max(rest, 0)
    while best >= 0:
        place = tl.min(tl.where(rest == best, offs_c, 0x7FFFFFFF), 0)
        spare -= tl.load(sizes + place).to(tl.float32)
        bits = tl.where(offs_c == tl.where(spare >= 0, place, -1), -3, bits)
        rest = tl.where(offs_c == place, -2, rest)
        best = tl.where(spare >= 0, tl.max(rest, 0), -2)
    return bits


@triton.jit
def not_finite(priority):
    """Return whether any priority of a tile is NaN or infinite: then it keeps every cluster."""
    finite = tl.abs(priority) < float("inf")
    return tl.sum(tl.where(finite, 0, 1), 0) > 0


@triton.jit
def top_p_kernel(priority, mass, sizes, kept, tiles, C, top_p, min_clusters, BLOCK_C: tl.constexpr):
    """Choose the clusters of one tile by their share of the mass."""
    tile = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    filled = tl.load(sizes + tile // tiles * C + offs_c, mask=mask_c, other=0) > 0
    value = tl.load(priority + tile * C + offs_c, mask=mask_c, other=0.0)
    bits = tl.where(filled, value.to(tl.int32, bitcast=True), -2)
    weight = tl.load(mass + tile * C + offs_c, mask=mask_c, other=0.0)
    chosen = take(bits, weight, top_p, True)
    ones = tl.full([BLOCK_C], 1.0, dtype=tl.float32)
    chosen = chosen | take(bits, ones, min_clusters, True)
    chosen = chosen | (filled & not_finite(value))
    tl.store(kept + tile * C + offs_c, chosen, mask=mask_c)


@triton.jit
def budget_kernel(priority, sizes, budget, kept, tiles, C, BLOCK_C: tl.constexpr):
    """Choose the clusters of one tile by a number of keys."""
    tile = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    keys = tl.load(sizes + tile // tiles * C + offs_c, mask=mask_c, other=0)
    value = tl.load(priority + tile * C + offs_c, mask=mask_c, other=0.0)
    bits = tl.where(keys > 0, value.to(tl.int32, bitcast=True), -2)
    keys = keys.to(tl.float32)
    room = tl.load(budget + tile)
    chosen = take(bits, keys, room, False)
    first = offs_c == tl.argmax(bits, 0)
    none = tl.sum(chosen.to(tl.int32), 0) == 0
    bits = tl.where(chosen | (first & (bits > -2) & none), -3, bits)
    for _ in tl.static_range(2):
        spare = room - tl.sum(tl.where(bits == -3, keys, 0.0), 0)
        bits = fill(bits, keys, sizes + tile // tiles * C, offs_c, spare)
    chosen = (bits == -3) | ((keys > 0) & not_finite(value))
    tl.store(kept + tile * C + offs_c, chosen, mask=mask_c)


def _options(count: int) -> dict[str, int]:
    """Return warps and registers of a program that chooses among `count` clusters.

    Sixteen clusters to a thread of 96 registers: with more, too few programs run to hide how long
    a sum over a warp takes. Measured with 1,000 clusters on an H200, 2026-11-28.
    """
    padded = triton.next_power_of_2(count)
    warps = min(16, max(1, padded // 512))
    options = {"num_warps": warps}
    if padded <= 512 * warps and not torch.version.hip:  # AMD's compiler has no such option
        options["maxnreg"] = 96
    return options


def keep_top_p(
    priority: Tensor, mass: Tensor, sizes: Tensor, top_p: float, min_clusters: int
) -> Tensor:
    """Launch `top_p_kernel`."""
    kept = torch.empty(priority.shape, dtype=torch.bool, device=priority.device)
    tiles, count = priority.shape[2:]
    grid = (kept.numel() // max(count, 1),)
    if kept.numel():
        with on(priority.device):
            top_p_kernel[grid](
                priority.contiguous(),
                mass.contiguous(),
                sizes.contiguous(),
                kept,
                tiles,
                count,
                top_p,
                float(min_clusters),
                BLOCK_C=triton.next_power_of_2(count),
                **_options(count),
            )
    return kept


def keep_budget(priority: Tensor, sizes: Tensor, budget: Tensor) -> Tensor:
    """Launch `budget_kernel`."""
    kept = torch.empty(priority.shape, dtype=torch.bool, device=priority.device)
    tiles, count = priority.shape[2:]
    grid = (kept.numel() // max(count, 1),)
    if kept.numel():
        with on(priority.device):
            budget_kernel[grid](
                priority.contiguous(),
                sizes.contiguous(),
                budget.float().contiguous(),
                kept,
                tiles,
                count,
                BLOCK_C=triton.next_power_of_2(count),
                **_options(count),
            )
    return kept
