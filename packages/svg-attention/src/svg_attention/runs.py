"""Merging what a query tile keeps into runs of consecutive keys.

All functions are vectorised, have static output shapes and never wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svg_attention.planner import device_planner


def merge_segments(
    starts: Tensor, ends: Tensor, kept: Tensor, *, slots: int, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Merge kept segments of the key axis into ascending disjoint runs.

    Neighbours that touch become one run. With `multiple > 1`, neighbours fewer than `multiple`
    rows apart become one as well (the rows between are read), which leaves every run room to grow
    to a multiple of that many rows without meeting the next one.

    Args:
        starts: `[..., C]` integers, first row of each segment, not decreasing.
        ends: `[..., C]` integers, one past the last row; segments are disjoint. `end == start`
            marks an empty segment, which never makes a run and never separates two.
        kept: `[..., C]` bool, broadcastable with `starts`.
        slots: run slots of the result; must hold the worst case.
        multiple: smallest gap between two runs.

    Returns:
        `(run_starts, run_lengths)`, int32 `[..., slots]`; unused slots are 0 and come last.
    """
    starts, ends, kept = torch.broadcast_tensors(starts, ends, kept)
    kept = kept & (ends > starts)
    # End of the last kept segment before each one; far below zero where there is none.
    reach = torch.where(kept, ends, -multiple).cummax(dim=-1).values
    previous = torch.cat([torch.full_like(reach[..., :1], -multiple), reach[..., :-1]], dim=-1)
    begins = kept & (starts - previous >= multiple)
    slot = torch.where(kept, begins.cumsum(dim=-1) - 1, slots)
    shape = (*kept.shape[:-1], slots + 1)
    first = torch.zeros(shape, dtype=torch.int32, device=kept.device)
    # Segments that begin no run write to the spare slot, which is cut off at the end.
    first.scatter_(-1, torch.where(begins, slot, slots), starts.to(torch.int32))
    last = torch.zeros(shape, dtype=torch.int32, device=kept.device)
    last.scatter_reduce_(-1, slot, ends.to(torch.int32), reduce="amax")
    run_starts, run_ends = first[..., :slots], last[..., :slots]
    return run_starts.contiguous(), (run_ends - run_starts).contiguous()


def round_runs(
    run_starts: Tensor, run_lengths: Tensor, *, multiple: int, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """Round every run up to a multiple of `multiple` rows by reading the real keys that follow.

    Runs that would meet are merged first, so no key is counted twice. Only a run that would pass
    `limit` keeps another length.

    Args:
        run_starts: int32 `[..., R]`, ascending, used slots first.
        run_lengths: int32 `[..., R]`, 0 = unused.
        multiple: rows.
        limit: integers broadcastable with `run_starts`, one past the last valid key.

    Returns:
        `(run_starts, run_lengths)` of the same shapes.
    """
    planner = device_planner(run_starts)
    if planner is not None and limit.numel() in (1, run_starts.shape[0]):
        limits = limit.to(torch.int32).reshape(-1).expand(run_starts.shape[0])
        rounded: tuple[Tensor, Tensor] = planner.round_runs(
            run_starts, run_lengths, multiple=multiple, limit=limits
        )
        return rounded
    slots = run_starts.shape[-1]
    used = run_lengths > 0
    ends = run_starts + run_lengths
    starts, lengths = merge_segments(run_starts, ends, used, slots=slots, multiple=multiple)
    grown = (lengths + multiple - 1) // multiple * multiple
    grown = torch.minimum(starts + grown, limit.to(grown.dtype)) - starts
    return starts, torch.where(lengths > 0, torch.maximum(grown, lengths), 0)


def cluster_runs(
    mask: Tensor, sizes: Tensor, *, tail: Tensor | int = 0, full: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Turn a choice of key clusters into runs over keys that are sorted by cluster.

    Cluster `j` occupies the rows after those of clusters `0 .. j-1`. After the last cluster
    stand `tail` further rows (text) that every tile reads.

    Args:
        mask: bool `[B, H, T, C]`, the clusters each query tile reads.
        sizes: integers `[B, H, C]`, keys of each cluster.
        tail: rows after the clusters: a number, or integers `[B]`.
        full: bool broadcastable with `[B, H, T]`, tiles that read every row; None for none.

    Returns:
        `(run_starts, run_lengths)`, int32 `[B, H, T, (C + 2) // 2]`.
    """
    shared = full is not None and full.dim() == 3 and full.shape[1] == 1
    if full is not None and not shared:
        mask, full = mask | full[..., None], None
    if isinstance(tail, Tensor):
        last = tail.to(sizes.dtype)[:, None, None].expand(*sizes.shape[:2], 1)
        rows = torch.cat([sizes, last], dim=-1)
    else:
        rows = torch.nn.functional.pad(sizes, (0, 1), value=tail)
    ends = rows.cumsum(dim=-1, dtype=torch.int32)
    planner = device_planner(mask)
    if planner is not None:
        whole = None if full is None else full[:, 0].expand(mask.shape[0], mask.shape[2])
        merged: tuple[Tensor, Tensor] = planner.merge_clusters(mask, ends, full=whole)
        return merged
    if full is not None:
        mask = mask | full[..., None]
    starts = torch.cat([torch.zeros_like(ends[..., :1]), ends[..., :-1]], dim=-1)
    kept = torch.cat([mask, torch.ones_like(mask[..., :1])], dim=-1)
    slots = (kept.shape[-1] + 1) // 2
    return merge_segments(starts[:, :, None], ends[:, :, None], kept, slots=slots)
