"""Reference backend: plain torch on any device, chunked so that scratch memory is bounded.

The oracle that other backends are held to; none of them imports it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Metric
from .common import (
    compute_dtype,
    finalize,
    inertia,
    point_weights,
    relabel_farthest,
    scoring,
    sort_by_label,
    spans,
    sum_dtype,
)


def assign(x: Tensor, centroids: Tensor, metric: Metric, *, tf32: bool = False) -> Tensor:
    """Return the int32 label `[B, N]` of the best centroid; the lowest index wins a tie.

    `tf32` has no effect here.
    """
    batch, n_points, dim = x.shape
    n_clusters = centroids.shape[1]
    dtype = compute_dtype(x)
    directions, bias, origin = scoring(centroids, metric, dtype)
    # Infinity times the zeros of a centroid that is not finite would be NaN, and win.
    guarded = x.device.type != "cpu" or bool(torch.isinf(bias).any())
    labels = torch.empty(batch, n_points, dtype=torch.int32, device=x.device)
    scratch, rows = (torch.empty(0, dtype=dtype, device=x.device) for _ in range(2))
    per_point = max(n_clusters, dim)
    for b in spans(batch, per_point * min(n_points, 64), x.device):
        weights, offset = directions[b].transpose(1, 2), bias[b].unsqueeze(1)
        for n in spans(n_points, per_point * (b.stop - b.start), x.device):
            scratch, scores = _view(scratch, (b.stop - b.start, n.stop - n.start, n_clusters))
            rows, points = _view(rows, (b.stop - b.start, n.stop - n.start, dim))
            points.copy_(x[b, n])
            if origin is not None:
                points.sub_(origin[b])
            if guarded:
                points.nan_to_num_(0.0, 0.0, 0.0)
            torch.bmm(points, weights, out=scores)
            labels[b, n] = _argmax(scores.add_(offset))
    return labels


def _view(buffer: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return a buffer that holds `shape`, the given one if it can, and its view of that shape."""
    size = math.prod(shape)
    if buffer.numel() < size:
        buffer = buffer.new_empty(size)
    return buffer, buffer[:size].view(shape)


def _argmax(scores: Tensor) -> Tensor:
    """Return the index of the first maximum of the last axis; NumPy's is the quicker on a CPU."""
    if scores.device.type == "cpu" and not scores.requires_grad:
        return torch.from_numpy(scores.numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


def cluster_sums(
    x: Tensor, labels: Tensor, order: Tensor, sizes: Tensor, weight: Tensor | None
) -> Tensor:
    """Return `[B, K, D]` sums of (weighted) points per cluster, without atomics."""
    batch, n_points, dim = x.shape
    n_clusters = sizes.shape[1]
    rows = x.reshape(batch * n_points, dim)
    factor = None if weight is None else weight.reshape(-1)
    base = torch.arange(batch, device=x.device).unsqueeze(1)
    if x.device.type == "cpu":
        index = (labels.long() + base * n_clusters).reshape(-1)
        sums = _sums_in_turn(rows, index, batch * n_clusters, factor).to(sum_dtype(x))
    else:
        index = (order.long() + base * n_points).reshape(-1)
        sums = _sums_in_bags(rows, index, sizes.reshape(-1), factor)
    return sums.view(batch, n_clusters, dim)


def _sums_in_turn(rows: Tensor, index: Tensor, n_sums: int, factor: Tensor | None) -> Tensor:
    """Add rows one after the other, in fp64; on a CPU that is the quickest, and bit-equal."""
    sums = torch.zeros(n_sums, rows.shape[1], dtype=torch.float64)
    buffer = torch.empty(0, dtype=torch.float64)
    for part in spans(rows.shape[0], rows.shape[1], rows.device):
        buffer, values = _view(buffer, (part.stop - part.start, rows.shape[1]))
        values.copy_(rows[part])
        if factor is not None:
            values.mul_(factor[part].unsqueeze(1))
        sums.index_add_(0, index[part], values)
    return sums


def _sums_in_bags(rows: Tensor, index: Tensor, sizes: Tensor, factor: Tensor | None) -> Tensor:
    """Add the rows of one sum after the other; `index` sorts them by sum."""
    dtype = sum_dtype(rows)
    ends = sizes.to(torch.int64).cumsum(0)
    bounds = torch.cat([ends.new_zeros(1), ends])
    sums = torch.zeros(len(sizes), rows.shape[1], dtype=dtype, device=rows.device)
    for part in spans(rows.shape[0], rows.shape[1], rows.device):
        picked = index[part]
        sums += F.embedding_bag(
            torch.arange(part.stop - part.start, device=rows.device),
            rows.index_select(0, picked).to(dtype),
            bounds.clamp(part.start, part.stop) - part.start,
            mode="sum",
            per_sample_weights=None if factor is None else factor[picked].to(dtype),
            include_last_offset=True,
        )
    return sums


def accumulate(
    x: Tensor,
    labels: Tensor,
    n_clusters: int,
    scale: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums `[B, K, D]`, total weights `[B, K]` and sizes `[B, K]` per cluster.

    `scale` and `weight` are those of `point_weights`.
    """
    sums, totals, sizes, _ = _accumulate(x, labels, n_clusters, scale, weight)
    return sums, totals, sizes


def _accumulate(
    x: Tensor, labels: Tensor, n_clusters: int, scale: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order, sizes = sort_by_label(labels, n_clusters)
    factor = weight if scale is None else scale if weight is None else scale * weight
    sums = cluster_sums(x, labels, order, sizes, factor)
    if weight is None:
        return sums, sizes.to(sums.dtype), sizes, order
    totals = cluster_sums(weight.unsqueeze(-1), labels, order, sizes, None).squeeze(-1)
    return sums, totals.to(sums.dtype), sizes, order


def update(
    x: Tensor, labels: Tensor, previous: Tensor, metric: Metric, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return centroids `[B, K, D]`, sizes and order for given labels (see `Update`)."""
    scale, mass = point_weights(x, metric, weight)
    sums, totals, sizes, order = _accumulate(x, labels, previous.shape[1], scale, mass)
    return finalize(sums, totals, previous, metric), sizes, order


def lloyd(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None,
    metric: Metric,
    empty: str,
    rounds: int,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run `rounds` rounds; return labels, centroids, sizes, order and inertia."""
    current = centroids
    for _ in range(rounds):
        labels = assign(x, current, metric)
        if empty == "farthest":
            labels = relabel_farthest(x, labels, current, metric, weight)
        current, sizes, order = update(x, labels, current, metric, weight)
    return labels, current, sizes, order, inertia(x, current, labels, metric, weight)
