"""Brute force in fp64, the judge of every backend."""

from __future__ import annotations

import torch
from torch import Tensor


def scores(x: Tensor, centroids: Tensor, metric: str = "euclidean") -> Tensor:
    """Return fp64 scores `[B, N, K]`; the label is the argmax."""
    x, c = x.double(), centroids.double()
    if metric == "euclidean":
        return -torch.cdist(x, c, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
    if metric == "cosine":
        x, c = (torch.nn.functional.normalize(t, dim=-1) for t in (x, c))
    return x @ c.transpose(1, 2)


def regret(x: Tensor, centroids: Tensor, labels: Tensor, metric: str = "euclidean") -> Tensor:
    """Return how far each label's score lies below the best one, `[B, N]`, zero when right."""
    all_scores = scores(x, centroids, metric)
    chosen = all_scores.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    return all_scores.amax(-1) - chosen


def rounding(x: Tensor, centroids: Tensor, metric: str = "euclidean") -> Tensor:
    """Return a bound `[B, N]` on the error of an fp32 score.

    A sum of D products carries at most about `sqrt(D) * eps` of `|x| |c|`; a factor of eight
    covers the unluckiest point of a million, the norm's own rounding and tensor-core truncation.
    """
    size = x.double().norm(dim=-1) * centroids.double().norm(dim=-1).amax(-1, keepdim=True)
    if metric == "cosine":
        size = torch.ones_like(size)
    if metric == "euclidean":
        size = size + centroids.double().square().sum(-1).amax(-1, keepdim=True) / 2
    return 8 * 2**-24 * max(x.shape[-1], 16) ** 0.5 * size


def means(x: Tensor, labels: Tensor, previous: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return fp64 means `[B, K, D]` of labelled points; empty clusters keep `previous`."""
    batch, n_clusters, _ = previous.shape
    weight = torch.ones(x.shape[:2], dtype=torch.float64) if weight is None else weight.double()
    out = previous.double().clone()
    for b in range(batch):
        for k in range(n_clusters):
            mask = labels[b] == k
            total = weight[b][mask].sum()
            if total > 0:
                out[b, k] = (x[b][mask].double() * weight[b][mask].unsqueeze(-1)).sum(0) / total
    return out


def blobs(
    batch: int,
    n: int,
    dim: int,
    clusters: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `[B, N, D]` points around random centres."""
    source = torch.Generator().manual_seed(seed)
    centres = torch.randn(batch, clusters, dim, generator=source) * 2
    pick = torch.randint(clusters, (batch, n, 1), generator=source).expand(-1, -1, dim)
    return (centres.gather(1, pick) + torch.randn(batch, n, dim, generator=source)).to(dtype)
