"""The public functions: whole clusterings and their two halves."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, common, ops, seeding
from .backend import select_backend
from .checks import Backend, Empty, Metric
from .result import KMeansResult, Update


def kmeans(
    x: Tensor,
    n_clusters: int,
    *,
    metric: Metric = "euclidean",
    init: str | Tensor = "random",
    max_iter: int = 25,
    tol: float = 0.0,
    generator: torch.Generator | None = None,
    sample_weight: Tensor | None = None,
    empty: Empty = "keep",
    deterministic: bool = False,
    backend: Backend = "auto",
    allow_tf32: bool = False,
) -> KMeansResult:
    """Cluster points by Lloyd's algorithm, every batch on its own.

    Each round labels every point with its best centroid and moves each centroid:

    - "euclidean": label `argmin_k |x - c_k|^2`, centroid the mean; lowers the sum of squared
      distances in every round.
    - "cosine": label `argmax_k cos(x, c_k)`, centroid the normalised sum of normalised points;
      lowers the sum of `1 - cos` in every round (spherical k-means). A zero point counts nowhere.
    - "dot": label `argmax_k x.c_k`, centroid the plain mean, not normalised. This is how inner-
      product indexes partition, and a fixed-point iteration: no objective falls in every round.

    With `tol=0` exactly `max_iter` rounds run, and on a GPU nothing synchronises with the host:
    the call can be captured in a CUDA graph and stays one operator under `torch.compile`.

    Args:
        x: `[N, D]` or `[B, N, D]`, fp16, bf16 or fp32 (fp64 on the reference backend), any strides.
        n_clusters: K, between 1 and N.
        metric: "euclidean", "cosine" or "dot".
        init: "random" (distinct points, uniformly), "k-means++", or a tensor `[B, K, D]` of
            starting centroids.
        max_iter: rounds to run, at least one; an upper bound when `tol > 0`.
        tol: stop once the summed squared movement of a batch's centroids is at most `tol` times
            the mean variance of its features, for every batch. Reads one flag back per round.
        generator: source of randomness for `init`; torch's default one when None. It may live on
            the CPU or on the device of `x`, and it is never seeded here.
        sample_weight: non-negative weights `[N]` or `[B, N]`.
        empty: "keep" leaves a cluster without points where it is; "farthest" moves into it the
            point that lies farthest from its own centroid.
        deterministic: ask for bit-equal results from run to run. Every backend computes that way
            (no floating-point atomics), so this is a promise kept either way.
        backend: "auto", "reference" (plain torch, any device) or "triton".
        allow_tf32: let the Triton backend compare fp32 points in TF32 (three decimal digits).

    Returns:
        KMeansResult; `labels`, `centroids`, `sizes`, `inertia` and `order` belong together.

    Raises:
        TypeError: if a dtype or the type of an argument is wrong.
        ValueError: if a shape or value is wrong, K exceeds N, or the points hold NaN or infinity.
            Points on a device are looked at only when `tol > 0`, since that synchronises; with
            `tol=0` their NaN shows as a NaN inertia.
        UnsupportedError: if `backend="triton"` cannot run here.

    Source: Lloyd 1982, "Least squares quantization in PCM"; Dhillon & Modha 2001 for "cosine".
    """
    points = checks.points(x).detach()
    checks.cluster_count(n_clusters, points.shape[1])
    _check_options(metric, empty, backend, max_iter, tol)
    weight = checks.weights_like(sample_weight, points)
    backend = select_backend(points, backend)
    start = _start(points, n_clusters, metric, init, generator, weight)
    if tol > 0:
        fields, rounds = _until_settled(
            points, start, weight, metric, empty, max_iter, tol, backend, allow_tf32
        )
    else:
        fields, rounds = (
            ops.lloyd(points, start, weight, metric, empty, max_iter, backend, allow_tf32),
            max_iter,
        )
    if x.dim() == 2:
        fields = tuple(f[0] for f in fields)
    labels, centroids, sizes, order, cost = fields
    return KMeansResult(labels, centroids, sizes, cost, rounds, order)


def assign(
    x: Tensor,
    centroids: Tensor,
    *,
    metric: Metric = "euclidean",
    backend: Backend = "auto",
    allow_tf32: bool = False,
) -> Tensor:
    """Label each point with its best centroid; the lowest index wins an exact tie.

    `argmin_k |x - c_k|^2`, `argmax_k cos(x, c_k)` or `argmax_k x.c_k`, accumulated in fp32.

    Args:
        x: `[N, D]` or `[B, N, D]`.
        centroids: `[K, D]` or `[B, K, D]`, converted to the dtype of `x`.
        metric: "euclidean", "cosine" or "dot".
        backend: "auto", "reference" or "triton".
        allow_tf32: let the Triton backend compare fp32 points in TF32.

    Returns:
        int32 `[N]` or `[B, N]`.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or value is wrong.
        UnsupportedError: if `backend="triton"` cannot run here.
    """
    points = checks.points(x).detach()
    checks.choice("metric", metric, Metric)
    checks.choice("backend", backend, Backend)
    means = checks.centroids_like(centroids, points, None, "centroids")
    backend = select_backend(points, backend)
    labels: Tensor = ops.assign(points, means, metric, backend, allow_tf32)
    return labels[0] if x.dim() == 2 else labels


def update(
    x: Tensor,
    labels: Tensor,
    n_clusters: int,
    *,
    previous: Tensor,
    metric: Metric = "euclidean",
    sample_weight: Tensor | None = None,
    backend: Backend = "auto",
) -> Update:
    """Move each centroid to the mean of the points that carry its label.

    Sums are accumulated in fp32 in a fixed order and rounded once. For "cosine" points are scaled
    to unit length first and the sum is normalised.

    Args:
        x: `[N, D]` or `[B, N, D]`.
        labels: int32 or int64 `[N]` or `[B, N]`, each in `[0, n_clusters)`; not checked.
        n_clusters: K, between 1 and N.
        previous: `[K, D]` or `[B, K, D]`; what a cluster without points keeps.
        metric: "euclidean", "cosine" or "dot".
        sample_weight: non-negative weights `[N]` or `[B, N]`.
        backend: "auto", "reference" or "triton".

    Returns:
        Update with centroids, sizes and the order that sorts points by label.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or value is wrong, or K exceeds N.
        UnsupportedError: if `backend="triton"` cannot run here.
    """
    points = checks.points(x).detach()
    checks.cluster_count(n_clusters, points.shape[1])
    checks.choice("metric", metric, Metric)
    checks.choice("backend", backend, Backend)
    names = checks.labels_like(labels, points)
    before = checks.centroids_like(previous, points, n_clusters, "previous")
    weight = checks.weights_like(sample_weight, points)
    backend = select_backend(points, backend)
    fields = ops.update(points, names, before, weight, metric, backend)
    return Update(*(f[0] for f in fields)) if x.dim() == 2 else Update(*fields)


def _check_options(metric: str, empty: str, backend: str, max_iter: int, tol: float) -> None:
    checks.choice("metric", metric, Metric)
    checks.choice("empty", empty, Empty)
    checks.choice("backend", backend, Backend)
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    if not tol >= 0:
        raise ValueError(f"tol must be zero or positive, got {tol}")


def _start(
    x: Tensor,
    n_clusters: int,
    metric: Metric,
    init: str | Tensor,
    generator: torch.Generator | None,
    weight: Tensor | None,
) -> Tensor:
    if isinstance(init, Tensor):
        return checks.centroids_like(init.detach(), x, n_clusters, "init")
    if init == "random":
        return seeding.random_rows(x, n_clusters, generator, weight)
    if init == "k-means++":
        return seeding.plus_plus(x, n_clusters, metric, generator, weight)
    raise ValueError(f"init must be 'random', 'k-means++' or a tensor, got {init!r}")


def _until_settled(
    x: Tensor,
    start: Tensor,
    weight: Tensor | None,
    metric: Metric,
    empty: Empty,
    max_iter: int,
    tol: float,
    backend: Backend,
    tf32: bool,
) -> tuple[tuple[Tensor, ...], int]:
    checks.finite(x)
    limit = tol * common.mean_variance(x)
    current, rounds, settled = start, 0, False
    while rounds < max_iter and not settled:
        last = current
        labels = ops.assign(x, current, metric, backend, tf32)
        if empty == "farthest":
            labels = common.relabel_farthest(x, labels, current, metric, weight)
        current, sizes, order = ops.update(x, labels, current, weight, metric, backend)
        moved = (current.to(limit.dtype) - last.to(limit.dtype)).square().sum((1, 2))
        settled = bool((moved <= limit).all())
        rounds += 1
    cost = common.inertia(x, current, labels, metric, weight)
    return (labels, current, sizes, order, cost), rounds
