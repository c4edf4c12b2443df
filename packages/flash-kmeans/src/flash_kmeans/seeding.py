"""Starting centroids, and new homes for clusters that lost all their points."""

from __future__ import annotations

import torch
from torch import Tensor

from . import common
from .checks import Metric


def random_indices(
    shape: torch.Size | tuple[int, int],
    n_clusters: int,
    device: torch.device,
    generator: torch.Generator | None,
    weight: Tensor | None = None,
) -> Tensor:
    """Draw `n_clusters` distinct indices below N for each batch of `shape = (B, N)`.

    Every subset is equally likely; with weights, indices are drawn one after another without
    replacement, each with odds proportional to its weight (Efraimidis & Spirakis 2006).
    """
    keys = _exponential(shape[0], shape[1], device, generator)
    if weight is not None:
        keys = keys / weight.to(keys.dtype)
    return keys.topk(n_clusters, dim=1, largest=False).indices


def random_rows(
    x: Tensor, n_clusters: int, generator: torch.Generator | None, weight: Tensor | None = None
) -> Tensor:
    """Pick `n_clusters` distinct points per batch, `[B, K, D]`, without synchronising."""
    return _rows(x, random_indices(x.shape[:2], n_clusters, x.device, generator, weight))


def plus_plus(
    x: Tensor,
    n_clusters: int,
    metric: Metric,
    generator: torch.Generator | None,
    weight: Tensor | None = None,
) -> Tensor:
    """Pick starting centroids by k-means++, `[B, K, D]`, all batches at once.

    Each next point is drawn with probability proportional to its (weighted) cost under the
    centroids so far: squared distance for "euclidean" and "dot", `1 - cos` for "cosine".

    Source: Arthur & Vassilvitskii 2007, "k-means++: the advantages of careful seeding".
    """
    seeding: Metric = "cosine" if metric == "cosine" else "euclidean"
    batch, n_points, dim = x.shape
    chosen = torch.empty(batch, n_clusters, dim, dtype=x.dtype, device=x.device)
    none = torch.zeros(batch, n_points, dtype=torch.int32, device=x.device)
    taken = torch.zeros(batch, n_points, dtype=torch.bool, device=x.device)
    mass = torch.ones(batch, n_points, dtype=common.compute_dtype(x), device=x.device)
    nearest = torch.full_like(mass, torch.inf)
    for k in range(n_clusters):
        odds = mass if weight is None else mass * weight
        picked = _draw(odds, taken, generator)
        taken.scatter_(1, picked, True)
        chosen[:, k : k + 1] = _rows(x, picked)
        costs = common.point_costs(x, chosen[:, k : k + 1], none, seeding)
        nearest = torch.minimum(nearest, costs.clamp_min_(0))
        mass = nearest
    return chosen


def _exponential(
    batch: int, n_points: int, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Draw Exp(1) variables: the smallest of `E_i / w_i` falls on i with odds `w_i`."""
    source = device if generator is None else generator.device
    uniform = torch.rand(batch, n_points, device=source, generator=generator)
    return uniform.clamp_(min=torch.finfo(torch.float32).tiny).log_().neg_().to(device)


def _draw(odds: Tensor, taken: Tensor, generator: torch.Generator | None) -> Tensor:
    clock = _exponential(odds.shape[0], odds.shape[1], odds.device, generator)
    # Points that coincide with a chosen one have no odds; any that is not taken may still follow.
    floor = torch.finfo(torch.float32).tiny
    race = odds.clamp(min=floor) / clock.to(odds.dtype).clamp_(min=floor)
    return race.masked_fill_(taken, -torch.inf).argmax(dim=1, keepdim=True)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
