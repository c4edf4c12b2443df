"""Planning on the device: one program per tile of queries, no sort.

What is kept is decided by a threshold on the priority, found by bisection on the bits of the
floating-point numbers (which rank like the numbers, none being negative); clusters that are equal
to the threshold are settled by a running sum in the order of their numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_kernels.planning._kernels.probes import on


@triton.jit
def larger(a, b):
    """Combine a running maximum."""
    return tl.maximum(a, b)


@triton.jit
def take(bits, weight, room, STRICT: tl.constexpr):
    """Take candidates by falling `bits` while they fit; return which. What is not one has -2.

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
    tl.store(kept + tile * C + offs_c, bits == -3, mask=mask_c)


@triton.jit
def segments(
    index,
    first,
    second,
    full,
    tile,
    sequence,
    batch,
    tiles,
    count,
    CLUSTERS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Return start, end and whether it is kept, of the segments `index` of a tile.

    With `CLUSTERS`, `first` is the mask, `second` the ends of clusters; else they are the starts
    and the lengths of runs.
    """
    inside = (index >= 0) & (index < count)
    if CLUSTERS:
        ends = second + sequence * count
        end = tl.load(ends + index, mask=inside, other=0)
        start = tl.load(ends + index - 1, mask=inside & (index > 0), other=0)
        choice = tl.load(
            first + tile * (count - 1) + index, mask=inside & (index < count - 1), other=0
        )
        kept = (choice != 0) | (index == count - 1)
        if FULL:
            kept = kept | (tl.load(full + batch * tiles + tile % tiles) != 0)
        kept = inside & kept & (end > start)
    else:
        start = tl.load(first + tile * count + index, mask=inside, other=0)
        length = tl.load(second + tile * count + index, mask=inside, other=0)
        end = start + length
        kept = inside & (length > 0)
    return start, end, kept


@triton.jit
def merge_kernel(
    first,
    second,
    full,
    limit,
    run_starts,
    run_lengths,
    heads,
    tiles,
    count,
    slots,
    multiple,
    CLUSTERS: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Merge the segments of one tile into runs; round them up if they were runs before."""
    tile = tl.program_id(0).to(tl.int64)
    sequence = tile // tiles
    batch = sequence // heads
    offs = tl.arange(0, BLOCK)
    start, end, kept = segments(
        offs, first, second, full, tile, sequence, batch, tiles, count, CLUSTERS, FULL
    )
    _, end_before, kept_before = segments(
        offs - 1, first, second, full, tile, sequence, batch, tiles, count, CLUSTERS, FULL
    )
    reach = tl.associative_scan(tl.where(kept_before, end_before, -multiple), 0, larger)
    begins = kept & (start - reach >= multiple)
    slot = tl.cumsum(begins.to(tl.int32), 0) - 1
    used = tl.sum(begins.to(tl.int32), 0)
    starts = run_starts + tile * slots
    lengths = run_lengths + tile * slots
    # A run ends where the segments before the next one end; the ends wait in `lengths`.
    tl.store(starts + slot, start, mask=begins)
    tl.store(lengths + slot - 1, reach, mask=begins & (slot > 0))
    tl.store(lengths + used - 1, tl.max(tl.where(kept, end, 0), 0), mask=used > 0)
    tl.debug_barrier()
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < used
    run = tl.load(starts + offs_r, mask=mask_r, other=0)
    length = tl.load(lengths + offs_r, mask=mask_r, other=0) - run
    if not CLUSTERS:
        rounded = (length + multiple - 1) // multiple * multiple
        rounded = tl.minimum(rounded, tl.load(limit + batch) - run)
        length = tl.maximum(rounded, length)
    length = tl.where(mask_r, length, 0)
    tl.debug_barrier()
    tl.store(starts + offs_r, run, mask=offs_r < slots)
    tl.store(lengths + offs_r, length, mask=offs_r < slots)


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
                num_warps=_warps(count),
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
                num_warps=_warps(count),
            )
    return kept


def merge_clusters(mask: Tensor, ends: Tensor, full: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch `merge_kernel` on clusters."""
    slots = (mask.shape[3] + 2) // 2
    full = None if full is None else full.contiguous()
    return _merge(mask.contiguous(), ends.contiguous(), full, None, mask, slots, 1)


def round_runs(
    run_starts: Tensor, run_lengths: Tensor, multiple: int, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch `merge_kernel` on runs."""
    first, second = run_starts.contiguous(), run_lengths.contiguous()
    limit = limit.int().contiguous()
    return _merge(first, second, None, limit, first, first.shape[3], multiple)


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


def _merge(
    first: Tensor,
    second: Tensor,
    full: Tensor | None,
    limit: Tensor | None,
    like: Tensor,
    slots: int,
    multiple: int,
) -> tuple[Tensor, Tensor]:
    clusters = limit is None
    batch, heads, tiles, count = like.shape
    shape = (batch, heads, tiles, slots)
    starts = torch.empty(shape, dtype=torch.int32, device=like.device)
    lengths = torch.empty_like(starts)
    if starts.numel():
        count += clusters
        with on(like.device):
            merge_kernel[(batch * heads * tiles,)](
                first.view(torch.uint8) if clusters else first,
                second,
                None if full is None else full.view(torch.uint8),
                limit,
                starts,
                lengths,
                heads,
                tiles,
                count,
                slots,
                multiple,
                CLUSTERS=clusters,
                FULL=full is not None,
                BLOCK=triton.next_power_of_2(count),
                BLOCK_R=triton.next_power_of_2(slots),
                num_warps=max(2, _warps(count)),
            )
    return starts, lengths


def _warps(count: int) -> int:
    """Give each thread at most 32 clusters."""
    return min(8, max(1, triton.next_power_of_2(count) // 1024))
