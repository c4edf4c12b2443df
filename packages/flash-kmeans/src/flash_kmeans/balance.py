"""Labels under which no cluster holds more than its share, for points that crowd together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import common, ops
from .checks import Backend, Metric


def largest_size(n_points: int, n_clusters: int, ratio: float) -> int:
    """Return how many points a cluster may hold: `ratio` times the mean, and enough for all."""
    return max(math.ceil(n_points / n_clusters), math.floor(ratio * n_points / n_clusters))


def bounded_labels(
    x: Tensor, labels: Tensor, centroids: Tensor, metric: Metric, largest: int, backend: Backend
) -> Tensor:
    """Return int32 labels `[B, N]` that give no cluster more than `largest` points.

    A cluster that has too many keeps those that cost it least and is closed; the others go to their
    best cluster among those still open, and so on. Every pass closes a cluster, so it ends after at
    most K. Synchronises.
    """
    items = zip(x, labels, centroids, strict=True)
    return torch.stack([_bounded(*item, metric, largest, backend) for item in items])


def _bounded(
    x: Tensor, labels: Tensor, centroids: Tensor, metric: Metric, largest: int, backend: Backend
) -> Tensor:
    n_clusters = centroids.shape[0]
    labels = labels.clone()
    costs = common.point_costs(x[None], centroids[None], labels[None], metric)[0]
    opened = torch.ones(n_clusters, dtype=torch.bool, device=x.device)
    while True:
        sizes = torch.bincount(labels, minlength=n_clusters)
        if bool((sizes <= largest).all()):
            return labels
        by_cost = costs.sort(stable=True).indices
        order = by_cost[labels[by_cost].sort(stable=True).indices]
        first = (sizes.cumsum(0) - sizes)[labels[order].long()]
        released = order[torch.arange(len(order), device=x.device) - first >= largest]
        opened &= sizes < largest
        homes = opened.nonzero().squeeze(1)
        part, means = x[released][None], centroids[homes][None]
        found = ops.assign(part, means, metric, backend, False)
        labels[released] = homes[found[0].long()].to(torch.int32)
        costs[released] = common.point_costs(part, means, found, metric)[0]
