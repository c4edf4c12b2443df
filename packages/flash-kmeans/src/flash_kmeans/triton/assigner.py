"""Launchers of the assignment: the portable kernel, and Hopper's where it takes the points."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .. import common
from ..checks import Metric
from . import assign, launch_config

try:  # The bulk copy engine needs descriptors, which older Triton does not have.
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

_FIRST_DESCRIBED = (9, 0)
# The warp-specialised kernel is for Hopper alone, at the width it was measured with.
_HOPPER = (9, 0)
_FEWEST_CLUSTERS = 65
_FEWEST_POINTS = 512


def capability(x: Tensor) -> tuple[int, int]:
    """Return the compute capability to pick tiles for; the interpreter poses as 8.0."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)


def adjacent_features(x: Tensor) -> Tensor:
    """Return `x` with adjacent features; other strides stay as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """State how points of all batches lie in one matrix, as the bulk copy engine is told of them.

    Attributes:
        rows: rows of the matrix.
        columns: columns of it.
        row_step: rows from a batch's first point to the next batch's.
        column_step: columns likewise.
    """

    rows: int
    columns: int
    row_step: int
    column_step: int


def sheet(x: Tensor) -> Sheet | None:
    """Return how points `[B, N, D]` lie in a matrix of rows `x.stride(1)` apart, or None.

    Batches may follow each other with whole rows between them (the video tokens of sequences that
    end in text), or share rows (the heads of a token).
    """
    batch, n_points, dim = x.shape
    step, row = x.stride(0), x.stride(1)
    if row < dim:
        return None
    if batch == 1:
        return Sheet(rows=n_points, columns=dim, row_step=0, column_step=0)
    if step % row == 0:
        step //= row
        rows = (batch - 1) * step + n_points
        return Sheet(rows=rows, columns=dim, row_step=step, column_step=0)
    columns = (batch - 1) * step + dim
    if columns <= row:
        return Sheet(rows=n_points, columns=columns, row_step=0, column_step=step)
    return None


@cache
def _hopper() -> Any:
    """Return the module of the warp-specialised kernel, if this Triton is one it is known on."""
    if not triton.__version__.startswith("3.6"):
        return None
    from . import assign_sm90

    return assign_sm90


def suits_hopper(x: Tensor, n_clusters: int, metric: Metric) -> bool:
    """Return whether the warp-specialised kernel takes these points."""
    batch, n_points, dim = x.shape
    place = sheet(x)
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and dim == 128
        and n_clusters >= _FEWEST_CLUSTERS
        and metric != "cosine"
        and place is not None
        and x.stride(1) % 8 == 0
        and x.data_ptr() % 16 == 0
        and batch * n_points >= _FEWEST_POINTS
        and max(place.rows, batch * n_points) < 2**31
        and capability(x) == _HOPPER
        and _hopper() is not None
    )


def assigner_for(
    x: Tensor, n_clusters: int, metric: Metric, *, tf32: bool = False, specialised: bool = True
) -> PortableAssigner | HopperAssigner:
    """Return what labels these points `[B, N, D]`, round after round."""
    x = adjacent_features(x)
    if specialised and suits_hopper(x, n_clusters, metric):
        return HopperAssigner(x, n_clusters, metric)
    return PortableAssigner(x, n_clusters, metric, tf32=tf32)


class _Assigner:
    """Hold what every round of a call labels with: allocated once, as are the labels.

    Attributes:
        directions: `[B, rows, width]`, zero beyond the clusters and features there are.
        bias: fp32 `[B, rows]`, added to scores; -inf beyond the clusters there are.
        scale: fp32 `[B, rows]`, of scores, for "cosine".
        labels: int32 `[B, N]`, overwritten by every call.
    """

    def __init__(
        self, x: Tensor, n_clusters: int, metric: Metric, tile: launch_config.Tile
    ) -> None:
        batch, n_points, dim = x.shape
        self.x, self.metric, self.tile = x, metric, tile
        self.k_tiles = triton.cdiv(n_clusters, tile.block_k)
        self.d_tiles = triton.cdiv(dim, tile.block_d)
        rows, width = self.k_tiles * tile.block_k, self.d_tiles * tile.block_d
        self.directions = x.new_empty(batch, rows, width)
        self.bias = x.new_empty(batch, rows, dtype=torch.float32)
        self.scale = torch.empty_like(self.bias) if metric == "cosine" else self.bias
        self.labels = x.new_empty(batch, n_points, dtype=torch.int32)

    def aim(self, centroids: Tensor) -> None:
        """Compare with centroids `[B, K, D]` from now on."""
        batch, n_clusters, dim = centroids.shape
        rows, width = self.directions.shape[1:]
        block = min(16, self.tile.block_k)
        assign.prepare_kernel[(batch * (rows // block),)](
            centroids.contiguous(), self.directions, self.scale, self.bias, n_clusters,
            rows // block, D=dim, WIDTH=width, BLOCK_K=block, BLOCK_D=min(width, 128),
            METRIC=self.metric, num_warps=1,
        )  # fmt: skip


class PortableAssigner(_Assigner):
    """Label with the kernel that runs anywhere."""

    def __init__(self, x: Tensor, n_clusters: int, metric: Metric, *, tf32: bool) -> None:
        chip = capability(x)
        tile = launch_config.tile_for(chip, x.element_size(), x.shape[2], n_clusters, x.shape[1])
        super().__init__(x, n_clusters, metric, tile)
        self.origin: Tensor | None = None
        self.precision = None
        if x.dtype == torch.float32:
            self.precision = "tf32" if tf32 else "tf32x3"
        self.described = TensorDescriptor is not None and chip >= _FIRST_DESCRIBED
        self.source: Any = self.directions
        self.shift: Any = self.bias
        if self.described:
            flat = self.directions.view(-1, self.directions.shape[-1])
            self.source = TensorDescriptor.from_tensor(flat, [tile.block_k, tile.block_d])
            self.shift = TensorDescriptor.from_tensor(self.bias.view(-1), [tile.block_k])

    @property
    def refreshable(self) -> bool:
        """Return whether an update can write what is compared with: fp32 wants an origin, too."""
        return self.precision is None

    def aim(self, centroids: Tensor) -> None:
        """Compare with centroids `[B, K, D]` from now on."""
        if self.refreshable:
            super().aim(centroids)
            return
        _, n_clusters, dim = centroids.shape
        directions, bias, origin = common.scoring(centroids, self.metric, torch.float32)
        self.directions.zero_()[:, :n_clusters, :dim] = directions
        self.bias.fill_(-torch.inf)[:, :n_clusters] = bias
        self.origin = None if origin is None else origin.contiguous()

    def __call__(self) -> Tensor:
        """Return int32 labels `[B, N]`."""
        x, tile, origin = self.x, self.tile, self.origin
        batch, n_points, dim = x.shape
        n_tiles = triton.cdiv(n_points, tile.block_n)
        assign.assign_kernel[(batch * n_tiles,)](
            x, self.source, self.scale, self.shift, self.bias if origin is None else origin,
            self.labels, n_points, self.k_tiles, n_tiles, x.stride(0), x.stride(1),
            D=dim, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_D=tile.block_d,
            D_TILES=self.d_tiles, STAGES=tile.stages, DESCRIBED=self.described,
            SCALED=self.metric == "cosine" and self.refreshable, CENTERED=origin is not None,
            PRECISION=self.precision, num_warps=tile.warps,
        )  # fmt: skip
        return self.labels


class HopperAssigner(_Assigner):
    """Label with the warp-specialised kernel; see `suits_hopper`."""

    refreshable = True

    def __init__(self, x: Tensor, n_clusters: int, metric: Metric) -> None:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Described

        kernel = self.kernel = _hopper()
        batch, n_points, dim = x.shape
        block_n, block_k = kernel.BLOCK_N, kernel.BLOCK_K
        tile = launch_config.Tile(
            block_n=block_n, block_k=block_k, block_d=dim, warps=4, stages=kernel.STAGES
        )
        super().__init__(x, n_clusters, metric, tile)
        dtype = kernel.gl.float16 if x.dtype == torch.float16 else kernel.gl.bfloat16
        place = sheet(x)
        if place is None:
            raise ValueError(f"points of strides {x.stride()} do not lie in one matrix")
        matrix = x.as_strided((place.rows, place.columns), (x.stride(1), 1))
        points = Described.from_tensor(matrix, [block_n, dim], kernel.shared_layout(block_n, dtype))
        source = Described.from_tensor(
            self.directions.view(-1, dim), [block_k, dim], kernel.shared_layout(block_k, dtype)
        )
        n_tiles = triton.cdiv(n_points, block_n * kernel.GROUPS)
        total = batch * n_tiles
        chips = torch.cuda.get_device_properties(x.device).multi_processor_count
        self.grid = (min(chips, total),)
        self.arguments = (
            points, source, self.bias, self.labels, n_points, place.row_step, place.column_step,
            n_tiles, self.k_tiles, total,
        )  # fmt: skip

    def __call__(self) -> Tensor:
        """Return int32 labels `[B, N]`."""
        kernel = self.kernel
        kernel.assign_kernel[self.grid](
            *self.arguments, BLOCK_N=kernel.BLOCK_N, BLOCK_K=kernel.BLOCK_K, D=self.x.shape[2],
            STAGES=kernel.STAGES, GROUPS=kernel.GROUPS, num_warps=kernel.WARPS,
        )  # fmt: skip
        return self.labels
