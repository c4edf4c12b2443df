"""Reference tier: plain torch on any device, chunked so that scratch memory is bounded.

Distances are never formed. With `score(x, c) = x.c - |c|^2 / 2` the nearest centroid is the one of
the highest score, and `|x|^2` (which, rounded, would swamp the differences between centroids of
data with a common offset) does not appear. Products and norms are accumulated in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Metric

# Scores held at once: small enough for a CPU's cache, large enough to fill a GPU.
_SCORES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}
_VALUES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of accumulation: fp64 for fp64 points, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _spans(
    total: int, per_item: int, budget: dict[str, int], device: torch.device
) -> Iterator[slice]:
    step = max(1, budget.get(device.type, budget["cuda"]) // max(1, per_item))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def inverse_norms(x: Tensor) -> Tensor:
    """Return `1 / |x|` per point, `[B, N]`, and zero for a zero point."""
    out = torch.empty(x.shape[:2], dtype=compute_dtype(x), device=x.device)
    for part in _spans(x.shape[1], x.shape[0] * x.shape[2], _VALUES_AT_ONCE, x.device):
        norm = x[:, part].to(out.dtype).norm(dim=-1)
        out[:, part] = torch.where(norm > 0, 1 / norm, 0)
    return out


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


def assign(x: Tensor, centroids: Tensor, metric: Metric) -> Tensor:
    """Return the int32 label `[B, N]` of the best centroid; the lowest index wins a tie."""
    batch, n_points, dim = x.shape
    n_clusters = centroids.shape[1]
    dtype = compute_dtype(x)
    directions, bias = scoring(centroids, metric, dtype)
    labels = torch.empty(batch, n_points, dtype=torch.int32, device=x.device)
    scratch = torch.empty(0, dtype=dtype, device=x.device)
    per_point = max(n_clusters, dim)
    for b in _spans(batch, per_point * min(n_points, 64), _SCORES_AT_ONCE, x.device):
        weights, offset = directions[b].transpose(1, 2), bias[b].unsqueeze(1)
        for n in _spans(n_points, per_point * (b.stop - b.start), _SCORES_AT_ONCE, x.device):
            shape = (b.stop - b.start, n.stop - n.start, n_clusters)
            if scratch.numel() < math.prod(shape):
                scratch = torch.empty(math.prod(shape), dtype=dtype, device=x.device)
            scores = scratch[: math.prod(shape)].view(shape)
            torch.bmm(x[b, n].to(dtype), weights, out=scores)
            labels[b, n] = _argmax(scores.add_(offset))
    return labels


def _argmax(scores: Tensor) -> Tensor:
    """Return the index of the first maximum of the last axis; NumPy's is the quicker on a CPU."""
    if scores.device.type == "cpu" and not scores.requires_grad:
        return torch.from_numpy(scores.numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


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


def cluster_sums(x: Tensor, order: Tensor, sizes: Tensor, weight: Tensor | None) -> Tensor:
    """Return `[B, K, D]` sums of (weighted) points per cluster, without atomics."""
    batch, n_points, dim = x.shape
    n_clusters = sizes.shape[1]
    dtype = compute_dtype(x)
    rows = x.reshape(batch * n_points, dim)
    base = torch.arange(batch, device=x.device).unsqueeze(1) * n_points
    index = (order.long() + base).reshape(-1)
    ends = sizes.reshape(-1).to(torch.int64).cumsum(0)
    bounds = torch.cat([ends.new_zeros(1), ends])
    scale = None if weight is None else weight.reshape(-1).to(dtype)
    sums = torch.zeros(batch * n_clusters, dim, dtype=dtype, device=x.device)
    for part in _spans(batch * n_points, dim, _VALUES_AT_ONCE, x.device):
        picked = index[part]
        offsets = bounds.clamp(part.start, part.stop) - part.start
        weights = None if scale is None else scale[picked]
        values = rows
        if x.dtype != dtype:
            values = rows.index_select(0, picked).to(dtype)
            picked = torch.arange(part.stop - part.start, device=x.device)
        sums += F.embedding_bag(
            picked,
            values,
            offsets,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )
    return sums.view(batch, n_clusters, dim)


def cluster_weights(
    order: Tensor, sizes: Tensor, weight: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the total weight per cluster `[B, K]`: the sizes where points have no weights."""
    if weight is None:
        return sizes.to(dtype)
    return cluster_sums(weight.unsqueeze(-1), order, sizes, None).squeeze(-1).to(dtype)


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
    for b in _spans(batch, min(n_points, 64) * dim, _VALUES_AT_ONCE, x.device):
        for n in _spans(n_points, (b.stop - b.start) * dim, _VALUES_AT_ONCE, x.device):
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


def update(
    x: Tensor, labels: Tensor, previous: Tensor, metric: Metric, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return centroids `[B, K, D]`, sizes and order for given labels (see `Update`)."""
    order, sizes = sort_by_label(labels, previous.shape[1])
    sums = cluster_sums(x, order, sizes, weight)
    totals = cluster_weights(order, sizes, weight, sums.dtype)
    return finalize(sums, totals, previous, metric), sizes, order


def lloyd(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None,
    scaled: Tensor | None,
    metric: Metric,
    empty: str,
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run `rounds` rounds; return labels, centroids, sizes, order and inertia.

    `scaled` is `weight` times what the metric folds into it.
    """
    from .seeding import relabel_farthest

    current = centroids
    for _ in range(rounds):
        labels = assign(x, current, metric)
        if empty == "farthest":
            labels = relabel_farthest(x, labels, current, metric)
        current, sizes, order = update(x, labels, current, metric, scaled)
    return labels, current, sizes, order, inertia(x, current, labels, metric, weight)


def mean_variance(x: Tensor) -> Tensor:
    """Return the variance of each feature averaged over features, `[B]`."""
    batch, n_points, dim = x.shape
    dtype = compute_dtype(x)
    parts = list(_spans(n_points, batch * dim, _VALUES_AT_ONCE, x.device))
    mean = torch.stack([x[:, p].to(dtype).sum(1) for p in parts]).sum(0).unsqueeze(1) / n_points
    squares = [(x[:, p].to(dtype) - mean).square_().sum((1, 2)) for p in parts]
    return torch.stack(squares).sum(0) / (n_points * dim)
