"""The public names of `flash-kmeans` 0.3.1, on top of this package.

Code written for that library runs unchanged: same calls, shapes and dtypes. `tol` is absolute here,
as it is there: rounds stop once no centroid moves by `tol` or more, and the centroids returned then
are those that gave the labels. What differs: a random start draws distinct points, so K may not
exceed N; nothing touches the global seed; launch parameters (`BLOCK_N` and its kin) have no effect
unless stated; points stay where they are when there is no GPU.

New code calls `flash_kmeans.kmeans`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_kmeans import common, ops, seeding
from flash_kmeans.backend import select_backend
from flash_kmeans.checks import Backend, Metric, cluster_count
from flash_kmeans.kmeans import assign, update
from flash_kmeans.streaming import kmeans_stream

Labelled = tuple[Tensor, Tensor, int]


def _rounds(
    start: Tensor, max_iters: int, tol: float, verbose: bool, step: Callable[[Tensor], Any]
) -> Labelled:
    """Repeat `labels, centroids = step(centroids)`; see the module for the rule that stops."""
    if max_iters < 1:
        raise ValueError(f"max_iters must be at least 1, got {max_iters}")
    current = start
    for i in range(max_iters):
        labels, moved = step(current)
        if verbose or tol > 0:
            shift = float((moved.double() - current.double()).norm(dim=-1).max())
            if verbose:
                print(f"Iter {i}, center shift: {shift:.6f}")
            if shift < tol:
                break
        current = moved
    return labels, current, i + 1


def _batch_kmeans(
    x: Tensor,
    n_clusters: int,
    metric: Metric,
    max_iters: int,
    tol: float,
    init_centroids: Tensor | None,
    verbose: bool,
    *,
    unit: bool = False,
    backend: Backend = "auto",
) -> Labelled:
    batch, n_points, dim = x.shape
    if init_centroids is None:
        cluster_count(n_clusters, n_points)
        start = seeding.random_rows(x, n_clusters, None)
    else:
        start = init_centroids.to(x.dtype).reshape(batch, n_clusters, dim)
    if metric == "cosine":
        start = F.normalize(start, dim=-1)

    def step(centroids: Tensor) -> tuple[Tensor, Tensor]:
        labels = assign(x, centroids, metric=metric, backend=backend)
        new = update(
            x, labels, n_clusters, previous=centroids, metric=metric, backend=backend
        ).centroids
        return labels, F.normalize(new, dim=-1) if unit else new

    return _rounds(start, max_iters, tol, verbose, step)


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
    """Cluster by squared distance.

    Args:
        x: `[B, N, D]`.
        n_clusters: K.
        max_iters: most rounds.
        tol: stop once no centroid moves this far; at zero every round runs.
        init_centroids: `[B, K, D]`, or None for distinct random points.
        verbose: print the largest movement of each round.
        use_heuristic: no effect.

    Returns:
        int32 labels `[B, N]`, centroids `[B, K, D]`, rounds run.
    """
    return _batch_kmeans(x, n_clusters, "euclidean", max_iters, tol, init_centroids, verbose)


def batch_kmeans_Cosine(
    x: Tensor,
    n_clusters: int,
    max_iters: int = 100,
    tol: float = 0.0,
    init_centroids: Tensor | None = None,
    verbose: bool = False,
) -> Labelled:
    """Cluster by cosine similarity, centroids of unit length; see `batch_kmeans_Euclid`."""
    return _batch_kmeans(x, n_clusters, "cosine", max_iters, tol, init_centroids, verbose)


def batch_kmeans_Dot(
    x: Tensor,
    n_clusters: int,
    max_iters: int = 100,
    tol: float = 0.0,
    init_centroids: Tensor | None = None,
    verbose: bool = False,
) -> Labelled:
    """Cluster by inner product with centroids scaled to unit length; see `batch_kmeans_Euclid`.

    Not the "dot" of `flash_kmeans.kmeans`, whose centroids are plain means.
    """
    return _batch_kmeans(x, n_clusters, "dot", max_iters, tol, init_centroids, verbose, unit=True)


def batch_kmeans_Euclid_torch_native(
    x: Tensor,
    n_clusters: int,
    max_iters: int = 100,
    tol: float = 0.0,
    init_centroids: Tensor | None = None,
    verbose: bool = False,
    chunk_size_N: int = 32768,
    chunk_size_K: int = 1024,
) -> Labelled:
    """Cluster by squared distance on the reference backend; see `batch_kmeans_Euclid`."""
    return _batch_kmeans(
        x, n_clusters, "euclidean", max_iters, tol, init_centroids, verbose, backend="reference"
    )


def kmeans_largeN(
    x: Tensor,
    n_clusters: int,
    max_iters: int = 100,
    tol: float = 0.0,
    verbose: bool = False,
    BLOCK_N: int = 1048576,
    init_centroids: Tensor | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster points on the host, `BLOCK_N` at a time, by squared distance.

    Args:
        x: `[N, D]`, on the host.
        n_clusters: K.
        max_iters: most rounds.
        tol: stop once no centroid moves this far; the centroids returned are the moved ones.
        verbose: print the largest movement of each round.
        BLOCK_N: points per chunk.
        init_centroids: `[K, D]`, or None for distinct random points.
        device: where to compute; a GPU if there is one, when None. One device is used.
        dtype: points are converted to it on the host, if given.

    Returns:
        int32 labels `[N]` and centroids `[K, D]`, on the device that computed.
    """
    return _large(x, n_clusters, max_iters, tol, verbose, BLOCK_N, init_centroids, device, dtype)


def _large(
    x: Tensor,
    n_clusters: int,
    max_iters: int,
    tol: float,
    verbose: bool,
    rows: int,
    start: Tensor | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    host = x if dtype is None else x.to(dtype)
    moved: list[Tensor] = []

    def step(centroids: Tensor) -> tuple[Tensor, Tensor]:
        result = kmeans_stream(
            host,
            n_clusters,
            init=centroids,
            max_iter=1,
            chunk_rows=rows,
            device=device,
            progress=False,
        )
        moved[:] = [result.centroids]
        return result.labels, result.centroids.cpu()

    if start is None:
        cluster_count(n_clusters, host.shape[0])
        start = seeding.random_rows(host[None], n_clusters, generator)[0]
    labels, _, _ = _rounds(start.to("cpu", host.dtype), max_iters, tol, verbose, step)
    return labels.to(moved[0].device), moved[0]


def kmeans_largeN_assign(
    x: Tensor,
    centroids: Tensor,
    BLOCK_N: int = 1048576,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Label points on the host, `BLOCK_N` at a time; int32 `[N]` on the device that computed."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    means = centroids.to(place)
    parts = (part.to(place, dtype or x.dtype) for part in x.split(BLOCK_N))
    return torch.cat([assign(part, means) for part in parts])


def euclid_assign_triton(
    x: Tensor,
    centroids: Tensor,
    x_sq: Tensor | None = None,
    out: Tensor | None = None,
    c_sq: Tensor | None = None,
    *,
    BLOCK_N: int = 128,
    BLOCK_K: int = 128,
    num_warps: int | None = None,
    num_stages: int | None = None,
    config: dict[str, int] | None = None,
    use_heuristic: bool = True,
) -> Tensor:
    """Return the int32 label `[B, N]` of the nearest centroid; squared norms are not needed."""
    return _written(assign(x, centroids), out)


def cosine_assign_triton(
    x: Tensor,
    centroids: Tensor,
    out: Tensor | None = None,
    *,
    BLOCK_N: int = 128,
    BLOCK_K: int = 128,
) -> Tensor:
    """Return the int32 label `[B, N]` of the centroid of highest inner product."""
    return _written(assign(x, centroids, metric="dot"), out)


def euclid_assign_torch_native_chunked(
    x: Tensor,
    centroids: Tensor,
    x_sq: Tensor | None = None,
    chunk_size_N: int = 32768,
    chunk_size_K: int = 1024,
) -> Tensor:
    """Return the int32 label `[B, N]` of the nearest centroid, on the reference backend."""
    return assign(x, centroids, backend="reference")


def _written(labels: Tensor, out: Tensor | None) -> Tensor:
    return labels if out is None else out.copy_(labels)


def triton_centroid_update_euclid(x: Tensor, cluster_ids: Tensor, old_centroids: Tensor) -> Tensor:
    """Return the mean `[B, K, D]` of each cluster; one without points keeps its old centroid."""
    return update(x, cluster_ids, old_centroids.shape[1], previous=old_centroids).centroids


def triton_centroid_update_sorted_euclid(
    x: Tensor,
    cluster_ids: Tensor,
    old_centroids: Tensor,
    *,
    BLOCK_N: int = 256,
    centroid_sums: Tensor | None = None,
    centroid_cnts: Tensor | None = None,
    calculate_new: bool = True,
) -> Tensor | None:
    """Add points to sums and counts, and return the means unless told not to.

    Args:
        x: `[B, N, D]`.
        cluster_ids: `[B, N]`.
        old_centroids: `[B, K, D]`, what a cluster without points keeps.
        BLOCK_N: no effect.
        centroid_sums: `[B, K, D]`, added to in place; zeros when None.
        centroid_cnts: `[B, K]`, likewise.
        calculate_new: False returns None, for points that come in parts.
    """
    backend = select_backend(x, "auto")
    labels = cluster_ids.to(torch.int32)
    sums, _, sizes = ops.accumulate(x, labels, old_centroids.shape[1], None, None, backend)
    sums = sums if centroid_sums is None else centroid_sums.add_(sums)
    sizes = sizes if centroid_cnts is None else centroid_cnts.add_(sizes)
    return common.finalize(sums, sizes, old_centroids, "euclidean") if calculate_new else None


def triton_centroid_update_cosine(
    x_norm: Tensor, cluster_ids: Tensor, old_centroids: Tensor
) -> Tensor:
    """Return the mean `[B, K, D]` of each cluster scaled to unit length."""
    means = triton_centroid_update_euclid(x_norm, cluster_ids, old_centroids)
    return F.normalize(means, dim=-1)


def triton_centroid_update_sorted_cosine(
    x_norm: Tensor, cluster_ids: Tensor, old_centroids: Tensor, *, BLOCK_N: int = 256
) -> Tensor:
    """Return what `triton_centroid_update_cosine` does; points are sorted here either way."""
    return triton_centroid_update_cosine(x_norm, cluster_ids, old_centroids)


def torch_loop_centroid_update(
    x_norm: Tensor,
    cluster_ids: Tensor,
    old_centroids: Tensor,
    mode: Literal["euclid", "cosine"] = "euclid",
) -> Tensor:
    """Return the mean of each cluster on the reference backend, of unit length for "cosine"."""
    moved = update(
        x_norm,
        cluster_ids,
        old_centroids.shape[1],
        previous=old_centroids,
        backend="reference",
    )
    if mode == "euclid":
        return moved.centroids
    # Unlike its other updates, the original leaves a cluster without points at its old length.
    alive = moved.sizes.unsqueeze(-1) > 0
    return torch.where(alive, F.normalize(moved.centroids, dim=-1), old_centroids)


def torch_loop_centroid_update_cosine(
    x_norm: Tensor, cluster_ids: Tensor, old_centroids: Tensor
) -> Tensor:
    """Return `torch_loop_centroid_update` with `mode="cosine"`."""
    return torch_loop_centroid_update(x_norm, cluster_ids, old_centroids, "cosine")


class FlashKMeans:
    """Hold one clustering by squared distance, with the methods and attributes of the original.

    Args:
        d: features D.
        k: clusters K.
        niter: most rounds.
        tol: stop once no centroid moves this far.
        use_triton: False asks for the reference backend.
        seed: of this object's own generator.
        chunk_size_data: no effect.
        chunk_size_centroids: no effect.
        chunk_size_data_cpu: points on the host beyond this number are read in chunks of it.
        verbose: print the largest movement of each round.
        dtype: points are converted to it, if given.
        device: points are moved to it; the first GPU if there is one, when None.

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
        chunk_size_data: int = 32768,
        chunk_size_centroids: int = 1024,
        chunk_size_data_cpu: int = 1048576,
        verbose: bool = False,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.d, self.k, self.niter, self.tol, self.seed = d, k, niter, tol, seed
        self.use_triton, self.verbose, self.dtype = use_triton, verbose, dtype
        self.chunk_size_data, self.chunk_size_centroids = chunk_size_data, chunk_size_centroids
        self.chunk_size_data_cpu = chunk_size_data_cpu
        self.device = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
        self.centroids_b: Tensor | None = None
        self.cluster_ids_b: Tensor | None = None
        self._batch_size: int | None = None

    @property
    def _backend(self) -> Backend:
        return "auto" if self.use_triton else "reference"

    def _check(self, data: Tensor) -> None:
        if data.dim() not in (2, 3) or data.shape[-1] != self.d:
            raise ValueError(
                f"data must be [N, {self.d}] or [B, N, {self.d}], got shape {tuple(data.shape)}; "
                f"the last axis holds the {self.d} features"
            )

    def _in_chunks(self, data: Tensor) -> bool:
        large = data.device.type == "cpu" and data.shape[-2] > self.chunk_size_data_cpu
        if large and data.dim() == 3:
            raise ValueError(
                f"points on the host beyond chunk_size_data_cpu={self.chunk_size_data_cpu} must be "
                f"[N, D], got shape {tuple(data.shape)}; move them to a device first"
            )
        return large

    def _moved(self, data: Tensor) -> Tensor:
        points = data.to(device=self.device, dtype=self.dtype or data.dtype)
        return points if points.dim() == 3 else points[None]

    def train(self, data: Tensor) -> FlashKMeans:
        """Cluster `[N, D]` or `[B, N, D]` points and remember centroids and labels."""
        self._check(data)
        source = torch.Generator(device="cpu").manual_seed(self.seed)
        if self._in_chunks(data):
            labels, centroids = _large(
                data,
                self.k,
                self.niter,
                self.tol,
                self.verbose,
                self.chunk_size_data_cpu,
                None,
                self.device,
                self.dtype,
                source,
            )
            self.centroids_b, self.cluster_ids_b = centroids[None], labels[None]
        else:
            points = self._moved(data)
            cluster_count(self.k, points.shape[1])
            self.cluster_ids_b, self.centroids_b, _ = _batch_kmeans(
                points,
                self.k,
                "euclidean",
                self.niter,
                self.tol,
                seeding.random_rows(points, self.k, source),
                self.verbose,
                backend=self._backend,
            )
        self._batch_size = data.shape[0] if data.dim() == 3 else None
        return self

    fit = train

    def predict(self, data: Tensor) -> Tensor:
        """Return the int32 label of each point, shaped as the points less D.

        Raises:
            RuntimeError: before `train`.
            ValueError: if the batch differs from that of `train`.
        """
        if self.centroids_b is None:
            raise RuntimeError("FlashKMeans has no centroids yet; call train first")
        self._check(data)
        batch = data.shape[0] if data.dim() == 3 else None
        if batch != self._batch_size:
            raise ValueError(
                f"FlashKMeans was trained on batch size {self._batch_size}, got {batch}; "
                "predict points of that shape"
            )
        if self._in_chunks(data):
            return kmeans_largeN_assign(
                data, self.centroids_b[0], self.chunk_size_data_cpu, self.device, self.dtype
            )
        points = self._moved(data)
        labels = assign(points, self.centroids_b.to(points.device), backend=self._backend)
        return labels if batch is not None else labels[0]

    def fit_predict(self, data: Tensor) -> Tensor:
        """Cluster points and return the labels of the last round, int32."""
        self.train(data)
        assert self.cluster_ids_b is not None
        return self.cluster_ids_b if self._batch_size is not None else self.cluster_ids_b[0]
