"""Starting centroids."""

from __future__ import annotations

import math

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
    replacement, each with odds proportional to its weight (Efraimidis & Spirakis 2006). One of
    weight zero is drawn only where the others do not suffice.
    """
    source = device if generator is None else generator.device
    uniform = torch.rand(shape[0], shape[1], device=source, generator=generator)
    # Exp(1) variables: the smallest of `E_i / w_i` falls on i with odds `w_i`.
    keys = uniform.clamp_(min=torch.finfo(torch.float32).tiny).log_().neg_().to(device)
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
    """Pick starting centroids by greedy k-means++, `[B, K, D]`, all batches at once.

    Each next centroid is the best of `2 + log K` candidates, the one that leaves the least
    (weighted) cost. They are drawn with odds proportional to their cost under the centroids so far:
    squared distance for "euclidean" and "dot", `1 - cos` for "cosine". Points of weight zero are
    drawn only where nothing else is left. Nothing synchronises.

    Source: Arthur & Vassilvitskii 2007, "k-means++: the advantages of careful seeding".
    """
    batch, n_points, dim = x.shape
    candidates = 2 + int(math.log(n_clusters))
    scale = common.inverse_norms(x) if metric == "cosine" else None
    chosen = torch.empty(batch, n_clusters, dim, dtype=x.dtype, device=x.device)
    free = torch.ones(batch, n_points, dtype=torch.float64, device=x.device)
    mass = free if weight is None else weight.double()
    nearest = torch.ones_like(free)
    for k in range(n_clusters):
        drawn = _draw((nearest * mass * free, mass * free, free), candidates if k else 1, generator)
        costs = _costs(x, scale, _rows(x, drawn))
        left = costs if k == 0 else torch.minimum(nearest.unsqueeze(-1), costs)
        best = (left * mass.unsqueeze(-1)).sum(1).argmin(-1, keepdim=True)
        picked = drawn.gather(1, best)
        chosen[:, k : k + 1] = _rows(x, picked)
        nearest = left.gather(2, best.unsqueeze(1).expand(-1, n_points, -1)).squeeze(-1)
        free = free.scatter(1, picked, 0)
    return chosen


def _costs(x: Tensor, scale: Tensor | None, centres: Tensor) -> Tensor:
    """Return squared distances `[B, N, L]` to `[B, L, D]`, fp64; zero where they are not finite.

    With `scale`, the inverse norms of `x`, of unit vectors.
    """
    dtype = common.compute_dtype(x)
    means = centres.to(dtype)
    if scale is not None:
        means = torch.nn.functional.normalize(means, dim=-1)
    batch, n_points, dim = x.shape
    out = torch.empty(batch, n_points, centres.shape[1], dtype=torch.float64, device=x.device)
    for part in common.spans(n_points, batch * dim, x.device):
        rows = x[:, part].to(dtype)
        if scale is not None:
            rows = rows * scale[:, part, None]
        apart = torch.cdist(rows, means, compute_mode="donot_use_mm_for_euclid_dist")
        out[:, part] = apart.square_()
    return out.nan_to_num_(nan=0.0, posinf=0.0)


def _draw(odds: tuple[Tensor, ...], count: int, generator: torch.Generator | None) -> Tensor:
    """Draw `count` indices `[B, count]` with the first odds `[B, N]` that are not all zero."""
    chosen = odds[-1]
    for more in reversed(odds[:-1]):
        chosen = torch.where(more.sum(1, keepdim=True) > 0, more, chosen)
    ends = chosen.cumsum(1)
    source = chosen.device if generator is None else generator.device
    uniform = torch.rand(
        chosen.shape[0], count, dtype=torch.float64, device=source, generator=generator
    )
    # A hair below one, so that rounding never lands behind the last that has odds.
    place = uniform.to(chosen.device) * (1 - 1e-12) * ends[:, -1:]
    return torch.searchsorted(ends, place, right=True).clamp_(max=chosen.shape[1] - 1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
