"""Mathematics that backends share: scores, costs, sorting by label, centroids from sums."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Metric

# Values held at once: small enough for a CPU's cache, large enough to fill a GPU.
VALUES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of accumulation: fp64 for fp64 points, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def spans(total: int, per_item: int, device: torch.device) -> Iterator[slice]:
    """Cut `total` items of `per_item` values each into slices that fit the device's scratch."""
    step = max(1, VALUES_AT_ONCE.get(device.type, VALUES_AT_ONCE["cuda"]) // max(1, per_item))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def inverse_norms(x: Tensor) -> Tensor:
    """Return `1 / |x|` per point, `[B, N]`, and zero for a zero point."""
    out = torch.empty(x.shape[:2], dtype=compute_dtype(x), device=x.device)
    for part in spans(x.shape[1], x.shape[0] * x.shape[2], x.device):
        norm = x[:, part].to(out.dtype).norm(dim=-1)
        out[:, part] = torch.where(norm > 0, 1 / norm, 0)
    return out


def point_weights(x: Tensor, metric: str, weight: Tensor | None) -> Tensor | None:
    """Fold what the metric needs into weights: "cosine" sums points scaled to unit length."""
    if metric != "cosine":
        return weight
    scale = inverse_norms(x)
    return scale if weight is None else scale * weight


def scoring(centroids: Tensor, metric: Metric, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return directions `[B, K, D]` and biases `[B, K]` so that `score = x.direction + bias`.

    Euclidean scores are taken relative to the mean centroid `m`: adding `-x.m` to every score of a
    point changes no comparison, and leaves smaller numbers to cancel.
    """
    c = centroids.to(dtype)
    if metric == "euclidean":
        mean = c.mean(dim=1, keepdim=True)
        directions = c - mean
        return directions, (directions * (c + mean)).sum(-1).mul_(-0.5)
    zero = torch.zeros(c.shape[:2], dtype=dtype, device=c.device)
    return (F.normalize(c, dim=-1) if metric == "cosine" else c), zero


def sort_by_label(labels: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Return the stable order int32 `[B, N]` of points by label, and sizes int32 `[B, K]`."""
    if labels.device.type == "cpu" and n_clusters < 1 << 15:
        # 16-bit keys get a radix sort, six times quicker than torch's.
        keys = labels.to(torch.int16).numpy()
        order = torch.from_numpy(keys.argsort(axis=1, kind="stable"))
    else:
        order = torch.sort(labels, dim=1, stable=True).indices
    sizes = torch.zeros(labels.shape[0], n_clusters, dtype=torch.int32, device=labels.device)
    ones = torch.ones((), dtype=torch.int32, device=labels.device).expand(labels.shape)
    sizes.scatter_add_(1, labels.long(), ones)
    return order.to(torch.int32), sizes


def finalize(sums: Tensor, totals: Tensor, previous: Tensor, metric: Metric) -> Tensor:
    """Turn sums into centroids in the dtype of `previous`; one without weight keeps its own."""
    if metric == "cosine":
        norm = sums.norm(dim=-1, keepdim=True)
        means, alive = sums / norm, norm > 0
    else:
        alive = (totals > 0).unsqueeze(-1)
        means = sums / totals.unsqueeze(-1)
    return torch.where(alive, means.to(previous.dtype), previous)


def point_costs(x: Tensor, centroids: Tensor, labels: Tensor, metric: Metric) -> Tensor:
    """Return each point's part of the objective `[B, N]` for its own centroid."""
    batch, n_points, dim = x.shape
    n_clusters = centroids.shape[1]
    dtype = compute_dtype(x)
    rows = centroids.reshape(batch * n_clusters, dim).to(dtype)
    base = torch.arange(batch, device=x.device).unsqueeze(1) * n_clusters
    out = torch.empty(batch, n_points, dtype=dtype, device=x.device)
    for b in spans(batch, min(n_points, 64) * dim, x.device):
        for n in spans(n_points, (b.stop - b.start) * dim, x.device):
            pick = (labels[b, n].long() + base[b]).reshape(-1)
            values = x[b, n].to(dtype)
            own = rows.index_select(0, pick).view(values.shape)
            if metric == "euclidean":
                out[b, n] = torch.linalg.vector_norm(own.sub_(values), dim=-1).square_()
            elif metric == "cosine":
                out[b, n] = 1 - F.cosine_similarity(values, own, dim=-1)
            else:
                out[b, n] = -(values * own).sum(-1)
    return out


def inertia(
    x: Tensor, centroids: Tensor, labels: Tensor, metric: Metric, weight: Tensor | None
) -> Tensor:
    """Return the objective `[B]`: the (weighted) sum of `point_costs`."""
    costs = point_costs(x, centroids, labels, metric)
    return (costs if weight is None else costs * weight).sum(-1)


def mean_variance(x: Tensor) -> Tensor:
    """Return the variance of each feature averaged over features, `[B]`."""
    batch, n_points, dim = x.shape
    dtype = compute_dtype(x)
    parts = list(spans(n_points, batch * dim, x.device))
    mean = torch.stack([x[:, p].to(dtype).sum(1) for p in parts]).sum(0).unsqueeze(1) / n_points
    squares = [(x[:, p].to(dtype) - mean).square_().sum((1, 2)) for p in parts]
    return torch.stack(squares).sum(0) / (n_points * dim)


def relabel_farthest(x: Tensor, labels: Tensor, centroids: Tensor, metric: Metric) -> Tensor:
    """Give each empty cluster one point: those that lie farthest from their own centroids.

    Points that are alone in their cluster stay. Returns new labels; nothing synchronises.
    """
    n_clusters = centroids.shape[1]
    index = labels.long()
    sizes = torch.zeros(centroids.shape[:2], dtype=torch.int64, device=x.device)
    sizes.scatter_add_(1, index, torch.ones_like(index))
    costs = point_costs(x, centroids, labels, metric)
    costs = costs.masked_fill(sizes.gather(1, index) <= 1, -torch.inf)
    best = costs.topk(n_clusters, dim=1)
    empty = sizes == 0
    # The empty clusters first, in ascending order; the j-th of them takes the j-th farthest point.
    homes = torch.sort(empty.to(torch.int32), dim=1, descending=True, stable=True).indices
    rank = torch.arange(n_clusters, device=x.device).expand_as(homes)
    moves = (rank < empty.sum(1, keepdim=True)) & torch.isfinite(best.values)
    target = torch.where(moves, homes, index.gather(1, best.indices))
    return index.scatter(1, best.indices, target).to(torch.int32)
