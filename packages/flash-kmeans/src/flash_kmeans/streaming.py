"""k-means over points that do not fit the device: host tensors and memory-mapped arrays."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks, common, ops, seeding
from .backend import select_backend
from .checks import Backend, Metric
from .kmeans import kmeans
from .partials import Partials

# Passes that draw candidates, and how many candidates a pass draws for each cluster.
_DRAWS, _CANDIDATES = 5, 2


@dataclass(frozen=True)
class StreamResult:
    """Hold a clustering of points that were read in chunks.

    Attributes:
        labels: int32 `[N]`, on the host.
        centroids: `[K, D]`, on the device that computed; means of the labelled points.
        sizes: int64 `[K]`, on that device.
        inertia: the objective over `labels` and `centroids`.
        n_iter: passes over the data.
    """

    labels: Tensor
    centroids: Tensor
    sizes: Tensor
    inertia: float
    n_iter: int


def kmeans_stream(
    source: Tensor | np.ndarray[Any, Any],
    n_clusters: int,
    *,
    metric: Metric = "euclidean",
    init: Any = "random",
    max_iter: int = 25,
    tol: float = 0.0,
    chunk_rows: int = 1 << 20,
    device: str | torch.device | None = None,
    generator: torch.Generator | None = None,
    sample_weight: Any = None,
    backend: Backend = "auto",
    progress: bool = True,
) -> StreamResult:
    """Cluster points that live on the host, a chunk at a time.

    Every round reads all points once. On a GPU two pinned buffers take turns, so that the next
    chunk travels while one is computed. The result equals that of `kmeans` up to rounding.

    Args:
        source: `[N, D]`, a CPU tensor or a NumPy array, `np.memmap` included. Floating points are
            computed as they are. Integers travel as they are and become fp32 (8 and 16 bits) or
            fp64 (more bits, on the reference backend), which holds them exactly up to 2^53.
        n_clusters: K, between 1 and N.
        metric: "euclidean", "cosine" or "dot", see `kmeans`.
        init: "random" (distinct points, uniformly), "k-means||" (better, six more passes), or
            starting centroids `[K, D]`, a tensor or an array.
        max_iter: passes over the data; an upper bound when `tol > 0`.
        tol: stop once the summed squared movement of centroids is at most `tol` times their mean
            squared distance from their mean.
        chunk_rows: points per chunk.
        device: where to compute; a GPU if there is one, when None.
        generator: source of randomness for `init`, on the CPU.
        sample_weight: finite weights of at least zero `[N]`, on the host.
        backend: "auto", "reference" or "triton".
        progress: show a line with the time left on standard error.

    Returns:
        StreamResult.

    Raises:
        TypeError: if a dtype or the type of an argument is wrong.
        ValueError: if a shape or value is wrong, or a chunk or weight is not finite.
        UnsupportedError: if `backend="triton"` cannot run on `device`.

    Source: Bahmani et al. 2012, "Scalable k-means++", for "k-means||".
    """
    checks.choice("metric", metric, Metric)
    checks.choice("backend", backend, Backend)
    max_iter = checks.integer("max_iter", max_iter, 1)
    tol = checks.real("tol", tol, 0.0)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    points = _Points(source, checks.integer("chunk_rows", chunk_rows, 1), place)
    n_clusters = checks.cluster_count(n_clusters, points.count)
    weight = checks.weights_like(sample_weight, points.pick(slice(1)).expand(1, points.count, -1))
    weights = None if weight is None else weight[0]
    if weights is not None:
        checks.valid_weights(weights)
    backend = select_backend(torch.empty(0, dtype=points.dtype, device=place), backend)
    current = _start(points, n_clusters, metric, init, generator, weights, backend)
    labels = torch.empty(points.count, dtype=torch.int32, device=place)
    bar = _Bar(max_iter * points.chunks) if checks.flag("progress", progress) else None
    rounds, settled = 0, False
    while rounds < max_iter and not settled:
        total = Partials.zeros(n_clusters, points.width, place)
        for start, x in points.read():
            rows = slice(start, start + x.shape[0])
            labels[rows] = ops.assign(x[None], current[None], metric, backend, False)[0]
            part = None if weights is None else weights[rows].to(place)
            total.add(x, labels[rows], current, metric, part, backend)
            if bar:
                bar.step()
        last = current
        current, cost = total.finish(last, metric)
        rounds += 1
        if tol > 0:
            settled = _moved_little(last, current, tol)
    if bar:
        bar.close()
    if not bool(torch.isfinite(cost)):
        raise ValueError("source must be finite, but it holds NaN or infinity; clean it first")
    return StreamResult(labels.cpu(), current, total.counts.long(), float(cost), rounds)


def _moved_little(last: Tensor, current: Tensor, tol: float) -> bool:
    moved = (current.double() - last.double()).square().sum()
    spread = (current.double() - current.double().mean(0)).square().sum() / len(current)
    return bool(moved <= tol * spread)


def _start(
    points: _Points,
    n_clusters: int,
    metric: Metric,
    init: Any,
    generator: torch.Generator | None,
    weight: Tensor | None,
    backend: Backend,
) -> Tensor:
    if not isinstance(init, str):
        given = checks.numeric(init, "init", torch.device("cpu")).cpu()
        start = checks.centroids_like(given, points.pick(slice(1))[None], n_clusters, "init")[0]
        checks.finite(start, "init")
        return start.to(points.device)
    if init == "k-means||":
        return _scalable(points, n_clusters, metric, generator, weight, backend)
    if init != "random":
        raise ValueError(
            f"init must be 'random', 'k-means||' or centroids for streamed points, got {init!r}"
        )
    return _random(points, n_clusters, generator, weight)


def _random(
    points: _Points, count: int, generator: torch.Generator | None, weight: Tensor | None
) -> Tensor:
    shape, host = (1, points.count), torch.device("cpu")
    batch = None if weight is None else weight[None]
    picked = seeding.random_indices(shape, count, host, generator, batch)[0]
    return points.pick(picked).to(points.device)


def _scalable(
    points: _Points,
    n_clusters: int,
    metric: Metric,
    generator: torch.Generator | None,
    weight: Tensor | None,
    backend: Backend,
) -> Tensor:
    """Return starting centroids by k-means||: many candidates in few passes, then few of them.

    Each pass draws about `2 K` points with odds proportional to their (weighted) cost under the
    candidates so far. The candidates, weighted by the points they are nearest to, are clustered.
    """
    near: Metric = "cosine" if metric == "cosine" else "euclidean"
    new = _random(points, 1, generator, weight)
    candidates = [new]
    nearest = torch.full((points.count,), torch.inf, dtype=torch.float64)
    for _ in range(_DRAWS):
        for start, x in points.read():
            labels = ops.assign(x[None], new[None], near, backend, False)
            costs = common.point_costs(x[None], new[None], labels, near)[0].double().cpu()
            rows = slice(start, start + x.shape[0])
            nearest[rows] = torch.minimum(nearest[rows], costs)
        odds = nearest if weight is None else nearest * weight
        share = _CANDIDATES * n_clusters / odds.sum()
        if not bool(torch.isfinite(share)):  # every point is a candidate, or one is not finite
            break
        drawn = torch.rand(points.count, dtype=torch.float64, generator=generator) < odds * share
        picked = drawn.nonzero().squeeze(1)
        if len(picked):
            new = points.pick(picked).to(points.device)
            candidates.append(new)
    if sum(len(part) for part in candidates) < n_clusters:
        candidates.append(_random(points, n_clusters, generator, weight))
    pool = torch.cat(candidates)
    mass = torch.zeros(len(pool), dtype=torch.float64, device=points.device)
    for start, x in points.read():
        labels = ops.assign(x[None], pool[None], near, backend, False)
        part = None if weight is None else weight[None, start : start + len(x)].to(points.device)
        mass += ops.accumulate(x[None], labels, len(pool), None, part, backend)[1][0]
    chosen = kmeans(
        pool,
        n_clusters,
        metric=near,
        init="k-means++",
        max_iter=10,
        generator=generator,
        sample_weight=mass,
        empty="farthest",
        backend=backend,
    )
    return chosen.centroids


class _Points:
    """Points on the host, read in chunks.

    Attributes:
        count: N.
        width: D.
        dtype: in which they are computed.
        device: where chunks are put.
        chunks: number of chunks of one pass.
    """

    def __init__(self, source: Any, rows: int, device: torch.device) -> None:
        if not isinstance(source, (Tensor, np.ndarray)):
            kind = type(source).__name__
            raise TypeError(f"source must be a CPU tensor or a NumPy array, got {kind}")
        if source.ndim != 2:
            raise ValueError(f"source must be [N, D], got shape {tuple(source.shape)}")
        if 0 in source.shape:
            raise ValueError(f"source must not be empty, got shape {tuple(source.shape)}")
        if isinstance(source, np.ndarray) and source.dtype.kind not in "fiub":
            raise TypeError(f"source must hold real numbers, got {source.dtype}")
        if isinstance(source, Tensor) and (source.is_cuda or source.is_complex()):
            what = "on a device; call kmeans" if source.is_cuda else "complex"
            raise ValueError(f"source must hold real numbers on the host, but it is {what}")
        self.source, self.rows, self.device = source, rows, device
        self.count, self.width = int(source.shape[0]), int(source.shape[1])
        self.chunks = -(-self.count // rows)
        stored = self._raw(slice(1)).dtype
        exact = torch.float32 if source.dtype.itemsize <= 2 else torch.float64
        self.dtype = stored if stored in checks.POINT_DTYPES else exact

    def _raw(self, rows: Any) -> Tensor:
        """Return rows as they are stored, or in the nearest type that torch can hold."""
        if isinstance(self.source, Tensor):
            return self.source[rows].detach()
        part = self.source[rows.numpy() if isinstance(rows, Tensor) else rows]
        if min(part.strides) < 0:  # which torch refuses even where one row makes it no matter
            part = part.copy()
        known = part.dtype.newbyteorder("=")
        if known.kind == "u" and known.itemsize > 1:
            known = np.dtype(np.int32 if known.itemsize == 2 else np.float64)
        if known.kind == "f" and known.itemsize > 8:
            known = np.dtype(np.float64)
        with warnings.catch_warnings():
            # Points are only read, so a map that cannot be written to is as good as any.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return torch.from_numpy(np.ascontiguousarray(part, dtype=known))

    def pick(self, rows: Any) -> Tensor:
        """Return some rows on the host, in the dtype of the computation."""
        return self._raw(rows).to(self.dtype)

    def read(self) -> Iterator[tuple[int, Tensor]]:
        """Yield chunks on the device; on a GPU the copy of the next one overlaps with the work."""
        starts = range(0, self.count, self.rows)
        if self.device.type != "cuda":
            for start in starts:
                yield start, self._raw(slice(start, start + self.rows)).to(self.device, self.dtype)
            return
        size, stored = (min(self.rows, self.count), self.width), self._raw(slice(1)).dtype
        pinned = [torch.empty(size, dtype=stored, pin_memory=True) for _ in range(2)]
        landed = [torch.empty(size, dtype=stored, device=self.device) for _ in range(2)]
        copied, used = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
        copies = torch.cuda.Stream(self.device)

        def send(i: int) -> int:
            slot, part = i % 2, self._raw(slice(starts[i], starts[i] + self.rows))
            copied[slot].synchronize()
            pinned[slot][: len(part)].copy_(part)
            copies.wait_event(used[slot])
            with torch.cuda.stream(copies):
                landed[slot][: len(part)].copy_(pinned[slot][: len(part)], non_blocking=True)
                copied[slot].record(copies)
            return len(part)

        counts = [send(0)]
        for i, start in enumerate(starts):
            torch.cuda.current_stream(self.device).wait_event(copied[i % 2])
            if i + 1 < len(starts):
                counts.append(send(i + 1))
            yield start, landed[i % 2][: counts[i]].to(self.dtype)
            used[i % 2].record(torch.cuda.current_stream(self.device))


class _Bar:
    """A line on standard error that shows how far the passes are."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.began, self.shown = total, 0, time.monotonic(), 0.0

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.shown < 0.2 and self.done < self.total:
            return
        self.shown = now
        left = (now - self.began) / self.done * (self.total - self.done)
        filled = 30 * self.done // self.total
        sys.stderr.write(
            f"\rk-means [{'#' * filled:<30}] {self.done}/{self.total}, {left:.0f} s left "
        )
        sys.stderr.flush()

    def close(self) -> None:
        sys.stderr.write("\n")
