"""Data-parallel k-means: every process holds some of the points, all end with one clustering."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks, common, ops, seeding
from .backend import select_backend
from .checks import Backend, Metric
from .partials import Partials
from .result import KMeansResult


def kmeans_distributed(
    x: Tensor,
    n_clusters: int,
    *,
    group: dist.ProcessGroup | None = None,
    metric: Metric = "euclidean",
    init: Any = "random",
    max_iter: int = 25,
    tol: float = 0.0,
    generator: torch.Generator | None = None,
    sample_weight: Any = None,
    backend: Backend = "auto",
) -> KMeansResult:
    """Cluster the points of all processes of a group together.

    Each round every process labels its own points; one all-reduce of `K * (D + 2)` numbers adds up
    what they found. The result is that of `kmeans` on the concatenated points, up to rounding,
    whatever the number of processes.

    Args:
        x: this process's points `[N_rank, D]`; counts may differ, the rest may not.
        n_clusters: K, at most the number of points of all processes together.
        group: the processes that take part; the default group when None.
        metric: "euclidean", "cosine" or "dot", see `kmeans`.
        init: "random", or starting centroids `[K, D]`, a tensor or an array, equal on all
            processes.
        max_iter: rounds to run; an upper bound when `tol > 0`.
        tol: as in `kmeans`, over all points.
        generator: source of randomness for `init`; that of the group's first process decides.
        sample_weight: finite weights of at least zero `[N_rank]` of this process's points.
        backend: "auto", "reference" or "triton".

    Returns:
        KMeansResult with `labels` and `order` of this process's points; `centroids`, `sizes`,
        `inertia` and `n_iter` of all.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or value is wrong; on every process if a weight or point is.
        RuntimeError: if torch.distributed is not initialised.
    """
    batch = checks.points(x).detach()
    if x.dim() != 2:
        raise ValueError(f"x must be [N, D] on every process, got shape {tuple(x.shape)}")
    points = batch[0]
    checks.choice("metric", metric, Metric)
    checks.choice("backend", backend, Backend)
    max_iter = checks.integer("max_iter", max_iter, 1)
    tol = checks.real("tol", tol, 0.0)
    weight = checks.weights_like(sample_weight, batch)
    counts = _counts(points, weight, group)
    n_clusters = checks.cluster_count(n_clusters, sum(counts))
    backend = select_backend(points, backend)
    current = _start(points, n_clusters, init, generator, weight, counts, group)
    limit = tol * _mean_variance(points, sum(counts), group) if tol > 0 else None
    rounds, settled = 0, False
    while rounds < max_iter and not settled:
        last = current
        labels = ops.assign(points[None], last[None], metric, backend, False)[0]
        total = Partials.zeros(n_clusters, points.shape[1], points.device)
        total.add(points, labels, last, metric, None if weight is None else weight[0], backend)
        vector = total.packed()
        dist.all_reduce(vector, group=group)
        total.unpack(vector)
        current, cost = total.finish(last, metric)
        rounds += 1
        if limit is not None:
            settled = bool((current.double() - last.double()).square().sum() <= limit)
    if not bool(torch.isfinite(cost)):
        raise ValueError("x must be finite on every process, but one holds NaN or infinity")
    order, _ = common.sort_by_label(labels[None], n_clusters)
    inertia = cost.to(common.compute_dtype(points))
    return KMeansResult(labels, current, total.counts.to(torch.int32), inertia, rounds, order[0])


def _counts(points: Tensor, weight: Tensor | None, group: dist.ProcessGroup | None) -> list[int]:
    """Return every process's number of points, or raise on all if the weights of one are wrong."""
    wrong = None
    try:
        if weight is not None:
            checks.valid_weights(weight)
    except ValueError as error:  # the others wait for this process, so they are told first
        wrong = error
    mine = torch.tensor([points.shape[0], wrong is not None], device=points.device)
    told = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(told, mine, group=group)
    if wrong is not None:
        raise wrong
    for rank, (_, refused) in enumerate(told):
        if refused:
            raise ValueError(f"sample_weight of process {rank} is not finite or is negative")
    return [int(count) for count, _ in told]


def _start(
    points: Tensor,
    n_clusters: int,
    init: Any,
    generator: torch.Generator | None,
    weight: Tensor | None,
    counts: list[int],
    group: dist.ProcessGroup | None,
) -> Tensor:
    if not isinstance(init, str):
        return checks.centroids_like(init, points[None], n_clusters, "init")[0]
    if init != "random":
        raise ValueError(f"init must be 'random' or centroids across processes, got {init!r}")
    rank = dist.get_rank(group)
    offset, total = sum(counts[:rank]), sum(counts)
    everyone = None
    if weight is not None:
        everyone = torch.zeros(1, total, dtype=weight.dtype, device=points.device)
        everyone[:, offset : offset + counts[rank]] = weight
        dist.all_reduce(everyone, group=group)
    picked = seeding.random_indices((1, total), n_clusters, points.device, generator, everyone)[0]
    first = dist.get_global_rank(group, 0) if group is not None else 0
    dist.broadcast(picked, src=first, group=group)
    local = picked - offset
    mine = (local >= 0) & (local < counts[rank])
    rows = points[local.clamp(0, counts[rank] - 1)].double() * mine.unsqueeze(-1)
    dist.all_reduce(rows, group=group)
    return rows.to(points.dtype)


def _mean_variance(points: Tensor, total: int, group: dist.ProcessGroup | None) -> Tensor:
    mean = points.sum(0, dtype=torch.float64)
    dist.all_reduce(mean, group=group)
    squares = (points.double() - mean / total).square().sum()
    dist.all_reduce(squares, group=group)
    return squares / (total * points.shape[1])
