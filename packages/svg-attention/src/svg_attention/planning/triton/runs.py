"""Merging and rounding runs with Triton: one program per tile of queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_attention.planning.triton.launch import on


@triton.jit
def larger(a, b):
    """Combine a running maximum."""
    return tl.maximum(a, b)


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
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Merge the segments of one tile into runs; round them up to a multiple of rows if asked."""
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
    if ROUND:
        if CLUSTERS:
            most = tl.load(second + sequence * count + count - 1)
        else:
            most = tl.load(limit + batch)
        rounded = (length + multiple - 1) // multiple * multiple
        rounded = tl.minimum(rounded, most - run)
        length = tl.maximum(rounded, length)
    length = tl.where(mask_r, length, 0)
    tl.debug_barrier()
    tl.store(starts + offs_r, run, mask=offs_r < slots)
    tl.store(lengths + offs_r, length, mask=offs_r < slots)


def merge_clusters(
    mask: Tensor, ends: Tensor, full: Tensor | None, multiple: int
) -> tuple[Tensor, Tensor]:
    """Launch `merge_kernel` on clusters."""
    slots = (mask.shape[3] + 2) // 2
    full = None if full is None else full.contiguous()
    return _merge(mask.contiguous(), ends.contiguous(), full, None, mask, slots, multiple)


def round_runs(
    run_starts: Tensor, run_lengths: Tensor, multiple: int, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch `merge_kernel` on runs."""
    first, second = run_starts.contiguous(), run_lengths.contiguous()
    limit = limit.int().contiguous()
    return _merge(first, second, None, limit, first, first.shape[3], multiple)


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
                ROUND=not clusters or multiple > 1,
                BLOCK=triton.next_power_of_2(count),
                BLOCK_R=triton.next_power_of_2(slots),
                num_warps=min(8, max(4, triton.next_power_of_2(count) // 1024)),
            )
    return starts, lengths
