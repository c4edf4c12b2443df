"""Merging segments of the key axis in plain torch; what closed-form patterns use on any device."""

from __future__ import annotations

import torch
from torch import Tensor


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
