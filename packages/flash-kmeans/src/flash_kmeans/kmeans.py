"""The public functions: whole clusterings and their two halves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import balance, checks, common, ops, seeding
from .backend import select_backend
from .checks import Backend, Empty, Metric
from .result import KMeansResult, Update


def kmeans(
    x: Tensor,
    n_clusters: int,
    *,
    metric: Metric = "euclidean",
    init: Any = "random",
    max_iter: int = 25,
    tol: float = 0.0,
    generator: torch.Generator | None = None,
    sample_weight: Any = None,
    empty: Empty = "keep",
    max_size_ratio: float | None = None,
    deterministic: bool = False,
    backend: Backend = "auto",
    allow_tf32: bool = False,
) -> KMeansResult:
    """Cluster points by Lloyd's algorithm, every batch on its own.

    Each round labels every point with its best centroid and moves each centroid:

    - "euclidean": label `argmin_k |x - c_k|^2`, centroid the mean; lowers the sum of squared
      distances in every round.
    - "cosine": label `argmax_k cos(x, c_k)`, centroid the normalised sum of normalised points;
      lowers the sum of `1 - cos` in every round (spherical k-means). A zero point moves nothing,
      and its cosine is zero.
    - "dot": label `argmax_k x.c_k`, centroid the plain mean, not normalised. This is how inner-
      product indexes partition, and a fixed-point iteration: no objective falls in every round.

    With `tol=0` exactly `max_iter` rounds run, and on a GPU nothing synchronises with the host:
    the call can be captured in a CUDA graph and stays one operator under `torch.compile`.

    Args:
        x: `[N, D]` or `[B, N, D]`, fp16, bf16 or fp32 (fp64 on the reference backend), any strides.
        n_clusters: K, between 1 and N.
        metric: "euclidean", "cosine" or "dot".
        init: "random" (distinct points, uniformly), "k-means++" (greedy, as in scikit-learn), or
            starting centroids `[B, K, D]`, a tensor or an array.
        max_iter: rounds to run, at least one; an upper bound when `tol > 0`.
        tol: stop once the summed squared movement of a batch's centroids is at most `tol` times
            the mean variance of its features, for every batch. Reads one flag back per round.
        generator: source of randomness for `init`; torch's default one when None. It may live on
            the CPU or on the device of `x`, and it is never seeded here.
        sample_weight: finite weights of at least zero, `[N]` or `[B, N]`, a tensor or an array.
        empty: "keep" leaves a cluster without points where it is; "farthest" moves into it the
            point that lies farthest from its own centroid. Points of weight zero do not count.
        max_size_ratio: the most points a cluster may hold, relative to the mean `N / K`; at least
            1. A bound for data of which a few clusters would hold nearly everything: points that
            find no room go to their best cluster that has some. Synchronises, several times a
            round, and no objective falls in every round. `assign` knows no bound.
        deterministic: ask for bit-equal results from run to run. Every backend computes that way
            (no floating-point atomics), so this is a promise kept either way.
        backend: "auto", "reference" (plain torch, any device) or "triton".
        allow_tf32: let the Triton backend compare fp32 points in TF32 (three decimal digits).

    Returns:
        KMeansResult; `labels`, `centroids`, `sizes`, `inertia` and `order` belong together.

    Raises:
        TypeError: if a dtype or the type of an argument is wrong.
        ValueError: if a shape or value is wrong, K exceeds N, or points, weights or starting
            centroids hold NaN or infinity. On a device values are looked at only when `tol > 0` or
            `max_size_ratio` is given, since that synchronises. Otherwise what is wrong shows as a
            NaN inertia, and only there: a centroid that is not finite attracts no point, one whose
            points are not finite stays where it is, labels are in range, and other batches are
            right.
        UnsupportedError: if `backend="triton"` cannot run here.

    Source: Lloyd 1982, "Least squares quantization in PCM"; Dhillon & Modha 2001 for "cosine".
    """
    points = checks.points(x).detach()
    n_clusters = checks.cluster_count(n_clusters, points.shape[1])
    checks.choice("metric", metric, Metric)
    checks.choice("empty", empty, Empty)
    checks.choice("backend", backend, Backend)
    max_iter = checks.integer("max_iter", max_iter, 1)
    tol = checks.real("tol", tol, 0.0)
    checks.flag("deterministic", deterministic)
    allow_tf32 = checks.flag("allow_tf32", allow_tf32)
    largest = None
    if max_size_ratio is not None:
        ratio = checks.real("max_size_ratio", max_size_ratio, 1.0)
        largest = balance.largest_size(points.shape[1], n_clusters, ratio)
    weight = checks.weights_like(sample_weight, points)
    backend = select_backend(points, backend)
    start = _start(points, n_clusters, metric, init, generator, weight)
    if tol > 0 or largest is not None:
        fields, rounds = _round_by_round(
            points, start, weight, metric, empty, max_iter, tol, largest, backend, allow_tf32
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
    centroids: Any,
    *,
    metric: Metric = "euclidean",
    backend: Backend = "auto",
    allow_tf32: bool = False,
) -> Tensor:
    """Label each point with its best centroid; the lowest index wins an exact tie.

    `argmin_k |x - c_k|^2`, `argmax_k cos(x, c_k)` or `argmax_k x.c_k`, accumulated in fp32.

    Args:
        x: `[N, D]` or `[B, N, D]`.
        centroids: `[K, D]` or `[B, K, D]`, a tensor or an array, converted to the dtype of `x`. One
            that is not finite attracts no point.
        metric: "euclidean", "cosine" or "dot".
        backend: "auto", "reference" or "triton".
        allow_tf32: let the Triton backend compare fp32 points in TF32.

    Returns:
        int32 `[N]` or `[B, N]`, each in `[0, K)` whatever `x` holds.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or value is wrong.
        UnsupportedError: if `backend="triton"` cannot run here.
    """
    points = checks.points(x).detach()
    checks.choice("metric", metric, Metric)
    checks.choice("backend", backend, Backend)
    allow_tf32 = checks.flag("allow_tf32", allow_tf32)
    means = checks.centroids_like(centroids, points, None, "centroids")
    backend = select_backend(points, backend)
    labels: Tensor = ops.assign(points, means, metric, backend, allow_tf32)
    return labels[0] if x.dim() == 2 else labels


def update(
    x: Tensor,
    labels: Tensor,
    n_clusters: int,
    *,
    previous: Any,
    metric: Metric = "euclidean",
    sample_weight: Any = None,
    backend: Backend = "auto",
) -> Update:
    """Move each centroid to the mean of the points that carry its label.

    Sums are accumulated in a fixed order, in fp32 for 16-bit points and in fp64 for others, and
    rounded once. For "cosine" points are scaled to unit length first and the sum is normalised. The
    points may be fewer than the clusters, as in a mini-batch.

    Args:
        x: `[N, D]` or `[B, N, D]`.
        labels: int32 or int64 `[N]` or `[B, N]`, each in `[0, n_clusters)`; on a device that is not
            checked.
        n_clusters: K, at least 1.
        previous: `[K, D]` or `[B, K, D]`; what a cluster keeps that has no points, or whose points
            are not finite.
        metric: "euclidean", "cosine" or "dot".
        sample_weight: finite weights of at least zero, `[N]` or `[B, N]`, a tensor or an array.
        backend: "auto", "reference" or "triton".

    Returns:
        Update with centroids, sizes and the order that sorts points by label.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or value is wrong.
        UnsupportedError: if `backend="triton"` cannot run here.
    """
    points = checks.points(x).detach()
    n_clusters = checks.integer("n_clusters", n_clusters, 1)
    checks.choice("metric", metric, Metric)
    checks.choice("backend", backend, Backend)
    names = checks.labels_like(labels, points)
    before = checks.centroids_like(previous, points, n_clusters, "previous")
    weight = checks.weights_like(sample_weight, points)
    backend = select_backend(points, backend)
    fields = ops.update(points, names, before, weight, metric, backend)
    return Update(*(f[0] for f in fields)) if x.dim() == 2 else Update(*fields)


def _start(
    x: Tensor,
    n_clusters: int,
    metric: Metric,
    init: Any,
    generator: torch.Generator | None,
    weight: Tensor | None,
) -> Tensor:
    if not isinstance(init, str):
        return checks.centroids_like(init, x, n_clusters, "init")
    if init == "random":
        return seeding.random_rows(x, n_clusters, generator, weight)
    if init == "k-means++":
        return seeding.plus_plus(x, n_clusters, metric, generator, weight)
    raise ValueError(f"init must be 'random', 'k-means++' or centroids, got {init!r}")


def _round_by_round(
    x: Tensor,
    start: Tensor,
    weight: Tensor | None,
    metric: Metric,
    empty: Empty,
    max_iter: int,
    tol: float,
    largest: int | None,
    backend: Backend,
    tf32: bool,
) -> tuple[tuple[Tensor, ...], int]:
    """Run rounds one operator at a time, until nothing moves where `tol > 0`."""
    checks.finite(x)
    checks.finite(start, "init")
    if weight is not None:
        checks.valid_weights(weight)
    limit = tol * common.mean_variance(x) if tol > 0 else None
    current, rounds, settled = start, 0, False
    while rounds < max_iter and not settled:
        last = current
        labels = ops.assign(x, current, metric, backend, tf32)
        if largest is not None:
            labels = balance.bounded_labels(x, labels, current, metric, largest, backend)
        if empty == "farthest":
            labels = common.relabel_farthest(x, labels, current, metric, weight)
        current, sizes, order = ops.update(x, labels, current, weight, metric, backend)
        if limit is not None:
            moved = (current.to(limit.dtype) - last.to(limit.dtype)).square().sum((1, 2))
            settled = bool((moved <= limit).all())
        rounds += 1
    cost = common.inertia(x, current, labels, metric, weight)
    return (labels, current, sizes, order, cost), rounds
