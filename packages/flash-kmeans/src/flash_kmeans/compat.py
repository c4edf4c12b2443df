"""The names and argument orders of the reference library, on top of this package.

For code that calls `batch_kmeans_Euclid` and friends; new code calls `flash_kmeans.kmeans`. What
differs on purpose: `tol` is relative and is tested only when positive, the random start draws
distinct points, and nothing touches the global seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import Metric
from .kmeans import assign, kmeans

Labelled = tuple[Tensor, Tensor, int]


def _run(
    x: Tensor, n_clusters: int, metric: Metric, max_iters: int, tol: float, init: Tensor | None
) -> Labelled:
    result = kmeans(
        x,
        n_clusters,
        metric=metric,
        init="random" if init is None else init,
        max_iter=max_iters,
        tol=max(tol, 0.0),
    )
    return result.labels, result.centroids, result.n_iter


def batch_kmeans_Euclid(
    x: Tensor,
    n_clusters: int,
    max_iters: int = 100,
    tol: float = 0.0,
    init_centroids: Tensor | None = None,
    verbose: bool = False,
    *,
    use_heuristic: bool = True,
) -> Labelled:
    """Cluster by squared distance; `verbose` and `use_heuristic` have no effect.

    Args:
        x: `[B, N, D]`.
        n_clusters: K.
        max_iters: rounds; an upper bound when `tol > 0`.
        tol: relative, see `flash_kmeans.kmeans`.
        init_centroids: `[B, K, D]` or None for distinct random points.
        verbose: ignored.
        use_heuristic: ignored.

    Returns:
        int32 labels `[B, N]`, centroids `[B, K, D]`, rounds run.
    """
    return _run(x, n_clusters, "euclidean", max_iters, tol, init_centroids)


def batch_kmeans_Cosine(
    x: Tensor,
    n_clusters: int,
    max_iters: int = 100,
    tol: float = 0.0,
    init_centroids: Tensor | None = None,
    verbose: bool = False,
) -> Labelled:
    """Cluster by cosine similarity; arguments and result as `batch_kmeans_Euclid`."""
    return _run(x, n_clusters, "cosine", max_iters, tol, init_centroids)


def batch_kmeans_Dot(
    x: Tensor,
    n_clusters: int,
    max_iters: int = 100,
    tol: float = 0.0,
    init_centroids: Tensor | None = None,
    verbose: bool = False,
) -> Labelled:
    """Cluster by inner product with plain means; arguments as `batch_kmeans_Euclid`.

    The reference library normalises centroids here, which is "cosine" in all but the start; this
    one does not, see `flash_kmeans.kmeans`.
    """
    return _run(x, n_clusters, "dot", max_iters, tol, init_centroids)


class FlashKMeans:
    """Hold the state of one clustering, with the reference library's methods and attributes.

    Args:
        d: features D.
        k: clusters K.
        niter: rounds; an upper bound when `tol > 0`.
        tol: relative, see `flash_kmeans.kmeans`.
        use_triton: False asks for the reference backend.
        seed: of this object's own generator.
        verbose: ignored.
        dtype: points are converted to it, if given.
        device: points are moved to it, if given.
        **ignored: chunk sizes, which have no use here.

    Attributes:
        centroids_b: `[B, K, D]` once trained.
        cluster_ids_b: int32 `[B, N]` once trained.
    """

    def __init__(
        self,
        d: int,
        k: int,
        niter: int = 25,
        tol: float = 1e-8,
        use_triton: bool = True,
        seed: int = 0,
        *,
        verbose: bool = False,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        **ignored: Any,
    ) -> None:
        unknown = set(ignored) - {"chunk_size_data", "chunk_size_centroids", "chunk_size_data_cpu"}
        if unknown:
            raise TypeError(f"FlashKMeans got unexpected arguments: {', '.join(sorted(unknown))}")
        self.d, self.k, self.niter, self.tol, self.seed = d, k, niter, tol, seed
        self.dtype, self.device, self.use_triton = dtype, device, use_triton
        self.centroids_b: Tensor | None = None
        self.cluster_ids_b: Tensor | None = None

    def _points(self, data: Tensor) -> Tensor:
        if data.shape[-1] != self.d:
            raise ValueError(f"data must have {self.d} features, got shape {tuple(data.shape)}")
        return data.to(device=self.device or data.device, dtype=self.dtype or data.dtype)

    def train(self, data: Tensor) -> FlashKMeans:
        """Cluster `[N, D]` or `[B, N, D]` points and remember the centroids."""
        points = self._points(data)
        result = kmeans(
            points if points.dim() == 3 else points[None],
            self.k,
            max_iter=self.niter,
            tol=max(self.tol, 0.0),
            generator=torch.Generator(device="cpu").manual_seed(self.seed),
            backend="auto" if self.use_triton else "reference",
        )
        self.centroids_b, self.cluster_ids_b = result.centroids, result.labels
        return self

    fit = train

    def predict(self, data: Tensor) -> Tensor:
        """Label points with the remembered centroids; int64, shaped as the points less D."""
        if self.centroids_b is None:
            raise RuntimeError("FlashKMeans has no centroids yet; call train first")
        points = self._points(data)
        batched = points if points.dim() == 3 else points[None]
        labels = assign(batched, self.centroids_b.to(points.device)).long()
        return labels if points.dim() == 3 else labels[0]

    def fit_predict(self, data: Tensor) -> Tensor:
        """Cluster points and return their labels."""
        return self.train(data).predict(data)


__all__ = ["FlashKMeans", "batch_kmeans_Cosine", "batch_kmeans_Dot", "batch_kmeans_Euclid"]
