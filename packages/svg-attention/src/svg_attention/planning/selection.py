"""Selecting, on the device, which key clusters each tile of queries reads."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_attention._ops import define_op
from svg_attention.planning.dispatch import select_planner


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

    With clusters ranked in descending priority, equal ones by number, cluster `j` is kept if the
    mass ranked before it is below `top_p`, or its rank is below `min_clusters`. The first is always
    kept; empty clusters never are. Where a priority of a tile is not finite, the tile keeps every
    cluster that has keys: what cannot be estimated is computed.

    The mass of a cluster is the share of a tile's attention that it is estimated to hold.

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
    """Keep, for each tile, clusters in descending priority until their keys fill a budget.

    Clusters are taken in order up to the first that does not fit (the first of all in any case);
    then, twice, those after it that fit what is left are taken in order the same way. Empty
    clusters are never kept. Where a priority of a tile is not finite, the tile keeps every cluster
    that has keys.

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
    kept: Tensor = select_planner(backend, priority.device).keep_top_p(
        priority, mass, sizes, top_p, min_clusters
    )
    return kept


def _run_budget(priority: Tensor, sizes: Tensor, budget: Tensor, backend: str) -> Tensor:
    kept: Tensor = select_planner(backend, priority.device).keep_budget(priority, sizes, budget)
    return kept


def _fake_top_p(
    priority: Tensor, mass: Tensor, sizes: Tensor, top_p: float, min_clusters: int, backend: str
) -> Tensor:
    return priority.new_empty(priority.shape, dtype=torch.bool)


def _fake_budget(priority: Tensor, sizes: Tensor, budget: Tensor, backend: str) -> Tensor:
    return priority.new_empty(priority.shape, dtype=torch.bool)


_keep_top_p = define_op(
    "keep_top_p",
    "(Tensor priority, Tensor mass, Tensor sizes, float top_p, int min_clusters, str backend)"
    " -> Tensor",
    _run_top_p,
    _fake_top_p,
)
_keep_budget = define_op(
    "keep_budget",
    "(Tensor priority, Tensor sizes, Tensor budget, str backend) -> Tensor",
    _run_budget,
    _fake_budget,
)
