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

from . import checks, ops, seeding
from .backend import select_backend
from .checks import Backend, Metric
from .partials import Partials


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
    init: str | Tensor = "random",
    max_iter: int = 25,
    tol: float = 0.0,
    chunk_rows: int = 1 << 20,
    device: str | torch.device | None = None,
    generator: torch.Generator | None = None,
    sample_weight: Tensor | None = None,
    backend: Backend = "auto",
    progress: bool = True,
) -> StreamResult:
    """Cluster points that live on the host, a chunk at a time.

    Every round reads all points once. On a GPU two pinned buffers take turns, so that the next
    chunk travels while one is computed. The result equals that of `kmeans` up to rounding.

    Args:
        source: `[N, D]`, a CPU tensor or a NumPy array, `np.memmap` included; fp16, bf16, fp32.
        n_clusters: K, between 1 and N.
        metric: "euclidean", "cosine" or "dot", see `kmeans`.
        init: "random" (distinct points, uniformly), or starting centroids `[K, D]`.
        max_iter: passes over the data; an upper bound when `tol > 0`.
        tol: stop once the summed squared movement of centroids is at most `tol` times their mean
            squared distance from their mean.
        chunk_rows: points per chunk.
        device: where to compute; a GPU if there is one, when None.
        generator: source of randomness for `init`, on the CPU.
        sample_weight: non-negative weights `[N]`, on the host.
        backend: "auto", "reference" or "triton".
        progress: show a line with the time left on standard error.

    Returns:
        StreamResult.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or value is wrong, or a chunk holds NaN or infinity.
        UnsupportedError: if `backend="triton"` cannot run on `device`.
    """
    host = _as_tensor(source) if isinstance(source, np.ndarray) else source
    if checks.points(host).shape[0] != 1 or host.dim() != 2:
        raise ValueError(f"source must be [N, D], got shape {tuple(host.shape)}")
    checks.cluster_count(n_clusters, host.shape[0])
    checks.choice("metric", metric, Metric)
    checks.choice("backend", backend, Backend)
    if max_iter < 1 or chunk_rows < 1 or not tol >= 0:
        raise ValueError(
            f"max_iter and chunk_rows must be at least 1 and tol at least 0, "
            f"got {max_iter}, {chunk_rows}, {tol}"
        )
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    weight = checks.weights_like(sample_weight, host.unsqueeze(0))
    weights = None if weight is None else weight[0]
    current = _start(host, n_clusters, init, generator, weight).to(place)
    backend = select_backend(current, backend)
    chunks = range(0, host.shape[0], chunk_rows)
    labels = torch.empty(host.shape[0], dtype=torch.int32, device=place)
    bar = _Bar(max_iter * len(chunks)) if progress else None
    rounds, settled = 0, False
    while rounds < max_iter and not settled:
        total = Partials.zeros(n_clusters, host.shape[1], place)
        for start, x in _chunks(host, chunk_rows, place):
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


def _as_tensor(source: np.ndarray[Any, Any]) -> Tensor:
    with warnings.catch_warnings():
        # Points are only read, so a map that cannot be written to is as good as any.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(source)


def _moved_little(last: Tensor, current: Tensor, tol: float) -> bool:
    moved = (current.double() - last.double()).square().sum()
    spread = (current.double() - current.double().mean(0)).square().sum() / len(current)
    return bool(moved <= tol * spread)


def _start(
    host: Tensor,
    n_clusters: int,
    init: str | Tensor,
    generator: torch.Generator | None,
    weight: Tensor | None,
) -> Tensor:
    if isinstance(init, Tensor):
        return checks.centroids_like(init.cpu(), host.unsqueeze(0), n_clusters, "init")[0]
    if init != "random":
        raise ValueError(f"init must be 'random' or a tensor for streamed points, got {init!r}")
    shape = (1, host.shape[0])
    return host[seeding.random_indices(shape, n_clusters, host.device, generator, weight)[0]]


def _chunks(host: Tensor, rows: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield chunks on the device; on a GPU the copy of the next one overlaps with the work."""
    starts = range(0, host.shape[0], rows)
    if device.type != "cuda":
        for start in starts:
            yield start, host[start : start + rows].to(device)
        return
    size = (min(rows, host.shape[0]), host.shape[1])
    pinned = [torch.empty(size, dtype=host.dtype, pin_memory=True) for _ in range(2)]
    landed = [torch.empty(size, dtype=host.dtype, device=device) for _ in range(2)]
    copied, used = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
    copies = torch.cuda.Stream(device)

    def send(i: int) -> int:
        slot, part = i % 2, host[starts[i] : starts[i] + rows]
        copied[slot].synchronize()
        pinned[slot][: len(part)].copy_(part)
        copies.wait_event(used[slot])
        with torch.cuda.stream(copies):
            landed[slot][: len(part)].copy_(pinned[slot][: len(part)], non_blocking=True)
            copied[slot].record(copies)
        return len(part)

    counts = [send(0)]
    for i, start in enumerate(starts):
        torch.cuda.current_stream(device).wait_event(copied[i % 2])
        if i + 1 < len(starts):
            counts.append(send(i + 1))
        yield start, landed[i % 2][: counts[i]]
        used[i % 2].record(torch.cuda.current_stream(device))


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
