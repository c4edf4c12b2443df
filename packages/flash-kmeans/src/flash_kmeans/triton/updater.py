"""Launchers of the update: sort points by label, sum each cluster's, finish centroids."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import common
from ..checks import Metric
from . import launch_config, order, update
from .assigner import HopperAssigner, PortableAssigner, adjacent_features

# Points of a chunk that is sorted and of a span that is summed; few points want many programs.
_CHUNK, _SPAN = 1024, 256
_SMALL, _SMALL_CHUNK, _SMALL_SPAN = 1 << 15, 256, 64
# Beyond this many counters torch's radix sort is used.
_MOST_COUNTERS = 1 << 27


class Updater:
    """Sum the points of one call per cluster; what it allocates serves every round.

    Attributes:
        order: int32 `[B, N]`, points sorted by label, by the last round.
        sizes: int32 `[B, K]`.
        starts: int32 `[B, K + 1]`, the first sorted position of each cluster, and N.
    """

    def __init__(
        self,
        x: Tensor,
        n_clusters: int,
        metric: Metric,
        scale: Tensor | None,
        weight: Tensor | None,
    ) -> None:
        batch, n_points, dim = x.shape
        small = n_points < _SMALL
        self.x, self.n_clusters, self.metric = adjacent_features(x), n_clusters, metric
        self.scale, self.weight = scale, weight
        whole = partial(torch.empty, dtype=torch.int32, device=x.device)
        self.order, self.sizes = whole(batch, n_points), whole(batch, n_clusters)
        self.starts = whole(batch, n_clusters + 1)
        self.chunk = min(_SMALL_CHUNK if small else _CHUNK, launch_config.next_power(n_points, 16))
        self.chunks = triton.cdiv(n_points, self.chunk)
        counters = batch * self.chunks * n_clusters
        largest_key = n_clusters * self.chunk
        self.counts = None
        if counters <= _MOST_COUNTERS and largest_key <= 2**31 - 2 * self.chunk:
            self.counts = whole(batch * self.chunks, n_clusters)
            self.keys = whole(batch * self.chunks, self.chunk)
            self.ranks = torch.empty_like(self.keys, dtype=torch.int16)
            self.arrived = torch.zeros(batch, dtype=torch.int32, device=x.device)
        self.span = _SMALL_SPAN if small else _SPAN
        self.spans = triton.cdiv(n_points, self.span)
        total = common.sum_dtype(x)
        self.floats = partial(torch.empty, dtype=torch.float32, device=x.device)
        self.wide = partial(torch.empty, dtype=total, device=x.device)
        self.accumulator = tl.float32 if total == torch.float32 else tl.float64
        self.empty = self.wide(0)
        self.sums, self.pieces = (self.wide(batch, n, dim) for n in (n_clusters, 2 * self.spans))
        self.totals = self.piece_totals = self.empty
        if weight is not None:
            self.totals = self.wide(batch, n_clusters)
            self.piece_totals = self.wide(batch, 2 * self.spans)

    def move(
        self,
        labels: Tensor,
        centroids: Tensor,
        *,
        assigner: PortableAssigner | HopperAssigner | None = None,
        cost: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Move centroids `[B, K, D]`, in place, to the means of the points with their labels.

        Args:
            labels: int32 `[B, N]`, contiguous.
            centroids: contiguous.
            assigner: is aimed at the new centroids.
            cost: also return parts of the objective, which belong to the new centroids.

        Returns:
            fp32 `[B, P]` and `[B, K]`, whose sum is the objective but for what "cosine" does to it;
            empty without `cost`.
        """
        by_distance = cost and self.metric != "dot"
        compared = centroids
        if by_distance and self.metric == "cosine":
            # What "cosine" compares has unit length; its centroids have it only up to rounding.
            compared = F.normalize(centroids.float(), dim=-1)
        costs = self._sum(labels, compared, by_distance)
        changes = self.wide(self.sizes.shape) if cost else self.empty
        self._finish(centroids, assigner, changes if cost else None, None)
        if assigner is not None and not assigner.refreshable:
            assigner.aim(centroids)
        return costs, changes

    def accumulate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums `[B, K, D]` and total weights `[B, K]` of the points with each label."""
        raw = torch.empty_like(self.sums), self.wide(self.sizes.shape)
        self._sum(labels, self.empty, False)
        self._finish(self.empty, None, None, raw)
        return raw

    def _sort(self, labels: Tensor) -> None:
        """Fill order, sizes and starts."""
        batch, n_points = labels.shape
        n_clusters, chunks = self.n_clusters, self.chunks
        wide = min(1024, launch_config.next_power(n_clusters, 16))
        if self.counts is None:
            self.order, self.sizes = common.sort_by_label(labels, n_clusters)
            order.starts_kernel[(batch,)](self.sizes, self.starts, n_clusters, BLOCK_K=wide)
            return
        order.sort_chunks_kernel[(batch * chunks,)](
            labels, self.keys, self.ranks, self.counts, n_points, n_clusters, chunks,
            CHUNK=self.chunk, BLOCK_K=1024, num_warps=1,
        )  # fmt: skip
        block = min(64, wide)
        blocks = triton.cdiv(n_clusters, block)
        order.scan_chunks_kernel[(batch * blocks,)](
            self.counts, self.sizes, self.starts, self.arrived, n_clusters, chunks, blocks,
            BLOCK_C=32, BLOCK_K=block, WIDE=wide, num_warps=4,
        )  # fmt: skip
        order.place_kernel[(batch * chunks,)](
            self.keys, self.ranks, self.counts, self.starts, self.order, n_points, n_clusters,
            chunks, CHUNK=self.chunk, num_warps=4,
        )  # fmt: skip

    def _sum(self, labels: Tensor, compared: Tensor, by_distance: bool) -> Tensor:
        """Sort and sum; return squared distances to what is compared with, fp32 `[B, P]`."""
        self._sort(labels)
        x = self.x
        batch, n_points, dim = x.shape
        block_d = min(256, launch_config.next_power(dim))
        block_n = max(1, min(64, 4096 // (block_d * x.element_size())))
        d_blocks = triton.cdiv(dim, block_d)
        costs = self.floats(batch, self.spans * d_blocks) if by_distance else self.empty
        update.segment_sums_kernel[(batch * self.spans, d_blocks)](
            x, self.order, labels, self.starts,
            self.empty if self.scale is None else self.scale,
            self.empty if self.weight is None else self.weight, compared,
            self.sums, self.totals, self.pieces, self.piece_totals, costs,
            n_points, self.n_clusters, self.spans, x.stride(0), x.stride(1),
            D=dim, SPAN=self.span, BLOCK_N=block_n, BLOCK_D=block_d, SUM=self.accumulator,
            SCALED=self.scale is not None, WEIGHTED=self.weight is not None,
            WITH_COST=by_distance, num_warps=1,
        )  # fmt: skip
        return costs

    def _finish(
        self,
        centroids: Tensor,
        assigner: PortableAssigner | HopperAssigner | None,
        changes: Tensor | None,
        raw: tuple[Tensor, Tensor] | None,
    ) -> None:
        batch, _, dim = self.x.shape
        width = launch_config.next_power(dim)
        directions = bias = scale = self.empty
        rows = padded = 0
        if assigner is not None and assigner.refreshable:
            directions, bias, scale = assigner.directions, assigner.bias, assigner.scale
            rows, padded = directions.shape[1:]
        raw_sums, raw_totals = (self.empty, self.empty) if raw is None else raw
        update.finish_kernel[(batch * self.n_clusters,)](
            self.starts, centroids, self.sums, self.totals, self.pieces, self.piece_totals,
            raw_sums, raw_totals, self.empty if changes is None else changes,
            directions, bias, scale, self.n_clusters, self.spans, rows,
            D=dim, SPAN=self.span, BLOCK_P=max(1, min(8, 2048 // width)), BLOCK_D=width,
            SUM=self.accumulator, METRIC=self.metric, WEIGHTED=self.weight is not None,
            WITH_COST=changes is not None, RAW=raw is not None, WIDTH=padded,
            num_warps=max(1, min(8, width // 512)),
        )  # fmt: skip
