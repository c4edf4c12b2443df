"""Brute force in fp64, the judge of every backend."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

import flash_kmeans as fk


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


def check_offset(offset: float, backend: str, device: str = "cpu", *, n: int = 600) -> None:
    """Cluster fp32 points of spread one that share an offset, and hold every field to fp64.

    Raises:
        AssertionError: if labels are not the nearest, centroids not the means, or the objective not
            that of labels and centroids, up to what fp32 can store.
    """
    source = torch.Generator().manual_seed(0)
    x = (torch.randn(1, n, 8, generator=source, dtype=torch.float64) + offset).float().to(device)
    before, result = (
        fk.kmeans(x, 5, init=x[:, :5], max_iter=i, backend=backend)  # type: ignore[arg-type]
        for i in (1, 2)
    )
    eps = torch.finfo(torch.float32).eps
    # Scores are of the size of the squared spread, summed over eight features.
    assert (regret(x, before.centroids, result.labels) <= 128 * eps).all()
    exact = means(x.cpu(), result.labels.cpu(), result.centroids.cpu()).to(device)
    assert ((result.centroids.double() - exact).abs() <= eps * offset).all()
    own = result.centroids.double().gather(1, result.labels.long()[..., None].expand(-1, -1, 8))
    cost = (x.double() - own).square().sum((1, 2))
    torch.testing.assert_close(result.inertia.double(), cost, rtol=1e-5, atol=0)


def check_small_angles(
    backend: str, dtype: torch.dtype, device: str = "cpu", *, n: int = 200
) -> None:
    """Cluster points that lie in nearly one direction by cosine, and hold the objective to fp64.

    Raises:
        AssertionError: if it is not that of the labels and centroids.
    """
    source = torch.Generator().manual_seed(0)
    x = (torch.randn(1, n, 16, generator=source) * 0.5 + 100).to(dtype).to(device)
    result = fk.kmeans(x, 8, init=x[:, :8].clone(), max_iter=2, metric="cosine", backend=backend)  # type: ignore[arg-type]
    own = result.centroids.double().gather(1, result.labels.long()[..., None].expand(-1, -1, 16))
    cost = (1 - torch.cosine_similarity(x.double(), own, dim=-1)).sum(-1)
    torch.testing.assert_close(result.inertia.double(), cost, rtol=2e-3, atol=0)


def check_bad_rows(backend: str, dtype: torch.dtype, empty: str, device: str = "cpu") -> None:
    """Run rounds on a batch of which one item holds NaN, infinity and a NaN start.

    The operator refuses such points on a CPU, so its backend is called.

    Raises:
        AssertionError: if a label leaves its range, a finite point gets a wrong label, a centroid
            that was finite no longer is, or the other item is not what it is alone.
    """
    name = "flash_kmeans.reference" if backend == "reference" else "flash_kmeans.triton.launch"
    module = importlib.import_module(name)

    def lloyd(points: Tensor, centroids: Tensor) -> Any:
        return module.lloyd(points, centroids, None, "euclidean", empty, 2, False)

    x = blobs(2, 40, 6, 5, dtype=dtype).to(device)
    start = x[:, :7].clone()
    alone = lloyd(x[:1], start[:1])
    x[1, 10, 2], x[1, 20], x[1, 30, 5] = torch.nan, torch.inf, -torch.inf
    start[1, 3, 1] = torch.nan
    fields = labels, centroids, sizes, order, cost = lloyd(x, start)
    for whole, part in zip(fields, alone, strict=True):
        assert torch.equal(whole[:1], part)
    assert ((labels >= 0) & (labels < 7)).all()
    assert torch.equal(order[1].sort().values.cpu(), torch.arange(40, dtype=torch.int32))
    assert int(sizes[1].sum()) == 40
    assert torch.isnan(cost[1])
    good = [k for k in range(7) if empty == "farthest" or k != 3]
    assert torch.isfinite(centroids[1, good]).all()
    # With these centroids every finite point goes to its nearest.
    again = module.assign(x, centroids, "euclidean")[1].cpu()
    rows = torch.isfinite(x[1].cpu()).all(-1)
    points, finite = x[1, rows.to(device)][None], centroids[1, good][None]
    places = torch.tensor([good.index(k) if k in good else -1 for k in range(7)])
    chosen = places[again[rows].long()]
    assert (chosen >= 0).all()
    limit = rounding(points, finite)
    assert (regret(points, finite, chosen[None].to(device)) <= limit).all()
