"""Values that the functions return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Update:
    """Hold the outcome of one centroid update.

    Attributes:
        centroids: `[B, K, D]` in the dtype of the points; means of the labelled points, and the
            previous centroid where a cluster has no points.
        sizes: int32 `[B, K]`, points per cluster.
        order: int32 `[B, N]`; `order[b, i]` is the index of the i-th point when points are sorted
            by label. Points with one label keep their relative order.
    """

    centroids: Tensor
    sizes: Tensor
    order: Tensor


@dataclass(frozen=True)
class KMeansResult:
    """Hold a clustering; its fields describe one and the same state.

    `centroids` are the means of the points with the returned `labels` (rounded once to the dtype
    of the points), so a further `assign` may still move points. Shapes lack the leading `B` when
    the points came as `[N, D]`.

    Attributes:
        labels: int32 `[B, N]`, the cluster of each point.
        centroids: `[B, K, D]` in the dtype of the points; a cluster without points keeps the
            centroid it had before.
        sizes: int32 `[B, K]`, points per cluster.
        inertia: fp32 `[B]` (fp64 for fp64 points), the objective over `labels` and `centroids`:
            the weighted sum of squared distances for "euclidean", of `1 - cos` for "cosine", and
            minus the weighted sum of inner products for "dot". NaN if the points hold a NaN.
        n_iter: rounds of assignment and update that were run.
        order: int32 `[B, N]`; `order[b, i]` is the index of the i-th point when points are sorted
            by label, stable.
    """

    labels: Tensor
    centroids: Tensor
    sizes: Tensor
    inertia: Tensor
    n_iter: int
    order: Tensor
