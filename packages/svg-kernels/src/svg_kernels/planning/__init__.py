"""Choosing, on the device, which key clusters each tile of queries reads, and as which runs."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels._backends import register
from svg_kernels.planning._tiers import choose, runs_on
from svg_kernels.planning.errors import probe_errors
from svg_kernels.planning.patterns import pattern_errors
from svg_kernels.planning.probes import probe_mass, probe_means

__all__ = [
    "keep_budget",
    "keep_top_p",
    "long_tiles_first",
    "merge_clusters",
    "pattern_errors",
    "probe_errors",
    "probe_mass",
    "probe_means",
    "round_runs",
    "runs_on",
]


def keep_top_p(
    priority: Tensor,
    mass: Tensor,
    sizes: Tensor,
    *,
    top_p: float,
    min_clusters: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Keep, for each tile, the first clusters by priority until their mass reaches `top_p`.

    With clusters ranked by falling priority, equal ones by number, cluster `j` is kept if the mass
    ranked before it is below `top_p`, or its rank is below `min_clusters`. The first is always
    kept; empty clusters never are.

    Args:
        priority: fp32 `[B, H, T, C]`, not negative.
        mass: fp32 `[B, H, T, C]`, a share of 1 for each cluster.
        sizes: int32 `[B, H, C]`, keys of each cluster.
        top_p: share of the mass to reach, above 0.
        min_clusters: clusters that are kept in any case.
        backend: `"auto"`, `"triton"` or `"reference"`.

    Returns:
        bool `[B, H, T, C]`.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device.

    Source: Yang et al. 2025, arXiv:2505.18875, section 3.2 (dynamic top-p selection).
    """
    _check(priority, sizes, mass)
    kept: Tensor = _keep_top_p(priority, mass, sizes, top_p, max(min_clusters, 1), backend)
    return kept


def keep_budget(
    priority: Tensor, sizes: Tensor, budget: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Keep, for each tile, clusters by falling priority until their keys fill a budget.

    Clusters are taken in order up to the first that does not fit (the first of all in any case);
    then, twice, those after it that fit what is left are taken in order the same way. Empty
    clusters are never kept.

    Args:
        priority: fp32 `[B, H, T, C]`, not negative; equal ones rank by number.
        sizes: int32 `[B, H, C]`, keys of each cluster; fewer than 2^24 in all.
        budget: fp32 `[B, H, T]`, keys.
        backend: `"auto"`, `"triton"` or `"reference"`.

    Returns:
        bool `[B, H, T, C]`.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device.
    """
    _check(priority, sizes, None)
    if tuple(budget.shape) != tuple(priority.shape[:3]) or budget.device != priority.device:
        raise ValueError(
            f"budget must be {list(priority.shape[:3])} on {priority.device}, "
            f"got {list(budget.shape)} on {budget.device}"
        )
    kept: Tensor = _keep_budget(priority, sizes, budget, backend)
    return kept


def merge_clusters(
    mask: Tensor, ends: Tensor, *, full: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Merge the clusters each tile reads into runs of consecutive key rows.

    Cluster `j` occupies the rows from `ends[j - 1]` to `ends[j]`; neighbours that touch become one
    run. A last segment, from `ends[C - 1]` to `ends[C]`, is read by every tile.

    Args:
        mask: bool `[B, H, T, C]`.
        ends: int32 `[B, H, C + 1]`, not decreasing.
        full: bool `[B, T]`, tiles that read every row; None for none.
        backend: `"auto"`, `"triton"` or `"reference"`.

    Returns:
        `(run_starts, run_lengths)`, int32 `[B, H, T, (C + 2) // 2]`; used slots come first and
        ascend, the others are 0.

    Raises:
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device.
    """
    batch, heads, tiles, count = mask.shape
    if tuple(ends.shape) != (batch, heads, count + 1) or ends.device != mask.device:
        raise ValueError(f"ends must be {[batch, heads, count + 1]}, got {list(ends.shape)}")
    if full is not None and tuple(full.shape) != (batch, tiles):
        raise ValueError(f"full must be {[batch, tiles]}, got {list(full.shape)}")
    starts, lengths = _merge_clusters(mask, ends, full, backend)
    return starts, lengths


def round_runs(
    run_starts: Tensor, run_lengths: Tensor, *, multiple: int, limit: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Round every run up to a multiple of rows by reading the real keys that follow.

    Runs fewer than `multiple` rows apart become one, so that no key is read twice. Only a run that
    would pass `limit` keeps another length.

    Args:
        run_starts: int32 `[B, H, T, R]`, ascending, used slots first.
        run_lengths: int32 `[B, H, T, R]`, 0 marks an unused slot.
        multiple: rows.
        limit: int32 `[B]`, one past the last valid key.
        backend: `"auto"`, `"triton"` or `"reference"`.

    Returns:
        `(run_starts, run_lengths)` of the same shapes.

    Raises:
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device.
    """
    if run_starts.shape != run_lengths.shape or run_starts.ndim != 4:
        raise ValueError(
            "run_starts and run_lengths must both be [B, H, T, R], "
            f"got {list(run_starts.shape)} and {list(run_lengths.shape)}"
        )
    if tuple(limit.shape) != (run_starts.shape[0],):
        raise ValueError(f"limit must be {[run_starts.shape[0]]}, got {list(limit.shape)}")
    starts, lengths = _round_runs(run_starts, run_lengths, multiple, limit, backend)
    return starts, lengths


def long_tiles_first(run_lengths: Tensor, *, ratio: float = 1.5, backend: str = "auto") -> Tensor:
    """Order tiles head by head, those that read much more than their head's average first.

    A tile of text rows reads every key; started last, it would run on alone. The others keep
    their order: neighbours read similar keys, which are then still in the cache.

    Args:
        run_lengths: int32 `[B, H, T, R]`.
        ratio: tiles that read more than this many times their head's mean come first.
        backend: `"auto"`, `"triton"` or `"reference"`.

    Returns:
        int32 `[B * H * T]`, tile numbers in the order to start them.

    Raises:
        ValueError: if a shape does not fit.
        UnsupportedError: if `backend` cannot run on this device.
    """
    if run_lengths.ndim != 4:
        raise ValueError(f"run_lengths must be [B, H, T, R], got {list(run_lengths.shape)}")
    order: Tensor = _long_tiles_first(run_lengths, ratio, backend)
    return order


def _check(priority: Tensor, sizes: Tensor, mass: Tensor | None) -> None:
    if priority.ndim != 4 or (mass is not None and mass.shape != priority.shape):
        raise ValueError("priority and mass must both be [B, H, T, C]")
    if tuple(sizes.shape) != (*priority.shape[:2], priority.shape[3]):
        expected = [*priority.shape[:2], priority.shape[3]]
        raise ValueError(f"sizes must be {expected}, got {list(sizes.shape)}")
    if priority.dtype != torch.float32 or (mass is not None and mass.dtype != torch.float32):
        raise TypeError(f"priority and mass must be fp32, got {priority.dtype}")
    if sizes.dtype != torch.int32:
        raise TypeError(f"sizes must be int32, got {sizes.dtype}; use sizes.int()")
    if sizes.device != priority.device:
        raise ValueError(f"sizes must be on {priority.device}, got {sizes.device}")


def _run_top_p(
    priority: Tensor, mass: Tensor, sizes: Tensor, top_p: float, min_clusters: int, backend: str
) -> Tensor:
    kept: Tensor = choose(backend, priority.device).keep_top_p(
        priority, mass, sizes, top_p, min_clusters
    )
    return kept


def _run_budget(priority: Tensor, sizes: Tensor, budget: Tensor, backend: str) -> Tensor:
    kept: Tensor = choose(backend, priority.device).keep_budget(priority, sizes, budget)
    return kept


def _run_merge(
    mask: Tensor, ends: Tensor, full: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    starts, lengths = choose(backend, mask.device).merge_clusters(mask, ends, full)
    return starts, lengths


def _run_round(
    run_starts: Tensor, run_lengths: Tensor, multiple: int, limit: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    starts, lengths = choose(backend, run_starts.device).round_runs(
        run_starts, run_lengths, multiple, limit
    )
    return starts, lengths


def _run_long_tiles(run_lengths: Tensor, ratio: float, backend: str) -> Tensor:
    rows = run_lengths.sum(dim=-1, dtype=torch.int32).flatten(0, 1)
    order: Tensor = choose(backend, run_lengths.device).long_tiles_first(rows, ratio)
    return order


def _fake_top_p(
    priority: Tensor, mass: Tensor, sizes: Tensor, top_p: float, min_clusters: int, backend: str
) -> Tensor:
    return priority.new_empty(priority.shape, dtype=torch.bool)


def _fake_budget(priority: Tensor, sizes: Tensor, budget: Tensor, backend: str) -> Tensor:
    return priority.new_empty(priority.shape, dtype=torch.bool)


def _fake_merge(
    mask: Tensor, ends: Tensor, full: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (*mask.shape[:3], (mask.shape[3] + 2) // 2)
    return ends.new_empty(shape), ends.new_empty(shape)


def _fake_round(
    run_starts: Tensor, run_lengths: Tensor, multiple: int, limit: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return run_starts.new_empty(run_starts.shape), run_starts.new_empty(run_starts.shape)


def _fake_long_tiles(run_lengths: Tensor, ratio: float, backend: str) -> Tensor:
    return run_lengths.new_empty(run_lengths.shape[:3].numel(), dtype=torch.int32)


_keep_top_p = register(
    "keep_top_p",
    "(Tensor priority, Tensor mass, Tensor sizes, float top_p, int min_clusters, str backend)"
    " -> Tensor",
    _run_top_p,
    _fake_top_p,
)
_keep_budget = register(
    "keep_budget",
    "(Tensor priority, Tensor sizes, Tensor budget, str backend) -> Tensor",
    _run_budget,
    _fake_budget,
)
_merge_clusters = register(
    "merge_clusters",
    "(Tensor mask, Tensor ends, Tensor? full, str backend) -> (Tensor, Tensor)",
    _run_merge,
    _fake_merge,
)
_round_runs = register(
    "round_runs",
    "(Tensor run_starts, Tensor run_lengths, int multiple, Tensor limit, str backend)"
    " -> (Tensor, Tensor)",
    _run_round,
    _fake_round,
)
_long_tiles_first = register(
    "long_tiles_first",
    "(Tensor run_lengths, float ratio, str backend) -> Tensor",
    _run_long_tiles,
    _fake_long_tiles,
)
