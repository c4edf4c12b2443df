"""The Triton backend's functions, called by name from `ops`. Nothing here synchronises."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import common
from ..checks import Metric
from .assigner import assigner_for, capability, suits_hopper
from .updater import Updater


def assign(
    x: Tensor,
    centroids: Tensor,
    metric: Metric,
    *,
    tf32: bool = False,
    specialised: bool = True,
) -> Tensor:
    """Return int32 labels `[B, N]`; see `flash_kmeans.assign`."""
    label = assigner_for(x, centroids.shape[1], metric, tf32=tf32, specialised=specialised)
    label.aim(centroids)
    return label()


def update(
    x: Tensor, labels: Tensor, previous: Tensor, metric: Metric, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return centroids, sizes and order."""
    scale, mass = common.point_weights(x, metric, weight)
    updater = Updater(x, previous.shape[1], metric, scale, mass)
    centroids = previous.clone(memory_format=torch.contiguous_format)
    updater.move(labels.contiguous(), centroids)
    return centroids, updater.sizes, updater.order


def accumulate(
    x: Tensor, labels: Tensor, n_clusters: int, scale: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums `[B, K, D]`, total weights `[B, K]` and sizes `[B, K]` per cluster."""
    updater = Updater(x, n_clusters, "euclidean", scale, weight)
    sums, totals = updater.accumulate(labels.contiguous())
    return sums, totals, updater.sizes


def lloyd(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None,
    metric: Metric,
    empty: str,
    rounds: int,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run `rounds` rounds; return labels, centroids, sizes, order and inertia.

    A round of 16-bit points is six launches and allocates nothing: an update writes what the next
    assignment compares with.
    """
    n_clusters = centroids.shape[1]
    scale, mass = common.point_weights(x, metric, weight)
    label = assigner_for(x, n_clusters, metric, tf32=tf32)
    updater = Updater(x, n_clusters, metric, scale, mass)
    current = centroids.clone(memory_format=torch.contiguous_format)
    label.aim(current)
    for i in range(rounds):
        last = i == rounds - 1
        labels = label()
        if empty == "farthest":
            labels = common.relabel_farthest(x, labels, current, metric, weight)
        costs, changes = updater.move(labels, current, assigner=None if last else label, cost=last)
    inertia = changes.sum(1, dtype=torch.float64)
    if metric != "dot":
        inertia = inertia + costs.sum(1, dtype=torch.float64)
    if scale is not None:
        # Half the squared distance of unit vectors, and one for a point without direction.
        lost = (scale == 0).double() if weight is None else (scale == 0) * weight.double()
        inertia = inertia / 2 + lost.sum(1)
    return labels, current, updater.sizes, updater.order, inertia.to(torch.float32)


__all__ = ["accumulate", "assign", "capability", "lloyd", "suits_hopper", "update"]
