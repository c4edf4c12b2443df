"""Planning in plain torch: any device, the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top_p(
    priority: Tensor, mass: Tensor, sizes: Tensor, top_p: float, min_clusters: int
) -> Tensor:
    """Sort by priority and keep a prefix."""
    order = _order(priority, sizes)
    ranked = mass.gather(-1, order)
    kept = ranked.cumsum(dim=-1) - ranked < top_p
    kept[..., :min_clusters] = True
    return _scatter(kept, order, sizes)


def keep_budget(priority: Tensor, sizes: Tensor, budget: Tensor) -> Tensor:
    """Sort by priority, keep the prefix that fits, then fill up twice."""
    order = _order(priority, sizes)
    keys = sizes.float()[:, :, None].expand_as(priority).gather(-1, order)
    kept = keys.cumsum(dim=-1) <= budget[..., None]
    kept[..., :1] = True
    for _ in range(2):
        spare = budget[..., None] - (keys * kept).sum(dim=-1, keepdim=True)
        fits = ~kept & (keys <= spare)
        kept = kept | (fits & ((keys * fits).cumsum(dim=-1) <= spare))
    return _scatter(kept, order, sizes)


def merge_clusters(mask: Tensor, ends: Tensor, full: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mark where kept rows begin and end among the clusters' edges."""
    if full is not None:
        mask = mask | full[:, None, :, None]
    kept = torch.nn.functional.pad(mask, (0, 1), value=True)
    ends = ends[:, :, None].expand(kept.shape)
    starts = torch.nn.functional.pad(ends[..., :-1], (1, 0))
    return _merge(starts, ends, kept & (ends > starts), 1, (mask.shape[-1] + 2) // 2)


def round_runs(
    run_starts: Tensor, run_lengths: Tensor, multiple: int, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge what lies close together, then lengthen."""
    ends = run_starts + run_lengths
    starts, lengths = _merge(
        run_starts, ends, run_lengths > 0, multiple, max(run_starts.shape[-1], 1)
    )
    rounded = (lengths + multiple - 1) // multiple * multiple
    rounded = torch.minimum(rounded, limit[:, None, None, None] - starts)
    lengths = torch.where(lengths > 0, torch.maximum(rounded, lengths), 0)
    slots = run_starts.shape[-1]
    return starts[..., :slots], lengths[..., :slots].int()


def long_tiles_first(rows: Tensor, ratio: float) -> Tensor:
    """Sort by whether a tile is short; the sort is stable."""
    rows = rows.float()
    sequences, tiles = rows.shape
    short = rows <= ratio * rows.mean(dim=-1, keepdim=True)
    order = short.to(torch.uint8).argsort(dim=-1, stable=True)
    return (order + torch.arange(sequences, device=rows.device)[:, None] * tiles).view(-1).int()


def _order(priority: Tensor, sizes: Tensor) -> Tensor:
    empty = (sizes == 0)[:, :, None]
    return priority.masked_fill(empty, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def _scatter(kept: Tensor, order: Tensor, sizes: Tensor) -> Tensor:
    return torch.zeros_like(kept).scatter_(-1, order, kept) & (sizes > 0)[:, :, None]


def _merge(
    starts: Tensor, ends: Tensor, kept: Tensor, gap: int, slots: int
) -> tuple[Tensor, Tensor]:
    """Merge ascending kept segments that are fewer than `gap` rows apart."""
    reach = torch.where(kept, ends, -gap).cummax(dim=-1).values
    before = torch.nn.functional.pad(reach[..., :-1], (1, 0), value=-gap)
    begins = kept & (starts - before >= gap)
    slot = torch.where(kept, begins.cumsum(dim=-1) - 1, slots)
    shape = (*kept.shape[:-1], slots + 1)
    first = torch.full(shape, torch.iinfo(torch.int32).max, dtype=torch.int32, device=kept.device)
    first.scatter_reduce_(-1, slot, starts.int(), reduce="amin")
    last = torch.zeros(shape, dtype=torch.int32, device=kept.device)
    last.scatter_reduce_(-1, slot, ends.int(), reduce="amax")
    first, last = first[..., :slots], last[..., :slots]
    return torch.where(last > 0, first, 0), torch.where(last > 0, last - first, 0)
