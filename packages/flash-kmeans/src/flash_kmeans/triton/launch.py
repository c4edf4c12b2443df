"""Launchers of the Triton backend: allocate, pick tiles, launch. Nothing here synchronises."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import common
from ..checks import Metric
from . import assign as assigning
from . import launch_config
from . import order as ordering
from . import update as updating

try:  # The bulk copy engine needs descriptors, which older Triton does not have.
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

# Labels are sorted in chunks; beyond this many counters per chunk torch's radix sort is used.
_CHUNK = 1024
_MOST_COUNTERS = 1 << 27
_SPAN = 256
_FIRST_DESCRIBED = (9, 0)
# The warp-specialised kernel is for Hopper alone, at the width it was measured with.
_HOPPER = (9, 0)
_FEWEST_CLUSTERS = 65
_FEWEST_POINTS = 512


def capability(x: Tensor) -> tuple[int, int]:
    """Return the compute capability to pick tiles for; the interpreter poses as 8.0."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)


def _rows(x: Tensor) -> Tensor:
    """Return `x` with adjacent features; other strides stay as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _padded(
    centroids: Tensor, metric: Metric, tile: launch_config.Tile
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int, int]:
    """Return zero-padded directions, scales, biases, an origin, steps over K and over D."""
    batch, n_clusters, dim = centroids.shape
    k_tiles, d_tiles = triton.cdiv(n_clusters, tile.block_k), triton.cdiv(dim, tile.block_d)
    rows, width = k_tiles * tile.block_k, d_tiles * tile.block_d
    if centroids.dtype == torch.float32:
        directions, bias, origin = common.scoring(centroids, metric, torch.float32)
        directions = F.pad(directions, (0, width - dim, 0, rows - n_clusters))
        bias = F.pad(bias, (0, rows - n_clusters), value=-torch.inf)
        return directions.contiguous(), bias, bias.contiguous(), origin, k_tiles, d_tiles
    directions = centroids.new_empty(batch, rows, width)
    bias = centroids.new_empty(batch, rows, dtype=torch.float32)
    scale = torch.empty_like(bias) if metric == "cosine" else bias
    block = min(16, tile.block_k)
    assigning.prepare_kernel[(batch * (rows // block),)](
        centroids, directions, scale, bias, n_clusters, rows // block,
        D=dim, WIDTH=width, BLOCK_K=block, BLOCK_D=min(width, 128), METRIC=metric, num_warps=1,
    )  # fmt: skip
    return directions, scale, bias, None, k_tiles, d_tiles


def assign(
    x: Tensor,
    centroids: Tensor,
    metric: Metric,
    *,
    tf32: bool = False,
    specialised: bool = True,
) -> Tensor:
    """Return int32 labels `[B, N]`; see `flash_kmeans.assign`."""
    x, centroids = _rows(x), centroids.contiguous()
    if specialised and suits_hopper(x, centroids.shape[1], metric):
        return _assign_hopper(x, centroids, metric)
    batch, n_points, dim = x.shape
    chip = capability(x)
    tile = launch_config.tile_for(chip, x.element_size(), dim, centroids.shape[1], n_points)
    directions, scale, bias, origin, k_tiles, d_tiles = _padded(centroids, metric, tile)
    described = TensorDescriptor is not None and chip >= _FIRST_DESCRIBED
    source: Any = directions
    shift: Any = bias
    if described:
        source = TensorDescriptor.from_tensor(
            directions.view(-1, directions.shape[-1]), [tile.block_k, tile.block_d]
        )
        shift = TensorDescriptor.from_tensor(bias.view(-1), [tile.block_k])
    labels = torch.empty(batch, n_points, dtype=torch.int32, device=x.device)
    n_tiles = triton.cdiv(n_points, tile.block_n)
    assigning.assign_kernel[(batch * n_tiles,)](
        x, source, scale, shift, bias if origin is None else origin.contiguous(), labels,
        n_points, k_tiles, n_tiles, x.stride(0), x.stride(1),
        D=dim, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_D=tile.block_d, D_TILES=d_tiles,
        STAGES=tile.stages, DESCRIBED=described,
        SCALED=metric == "cosine" and x.dtype != torch.float32, CENTERED=origin is not None,
        PRECISION="tf32" if tf32 else "tf32x3" if x.dtype == torch.float32 else None,
        num_warps=tile.warps,
    )  # fmt: skip
    return labels


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
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and dim == 128
        and n_clusters >= _FEWEST_CLUSTERS
        and metric != "cosine"
        and (batch == 1 or x.stride(0) == n_points * x.stride(1))
        and x.stride(1) % 8 == 0
        and x.data_ptr() % 16 == 0
        and _FEWEST_POINTS <= batch * n_points < 2**31
        and capability(x) == _HOPPER
        and _hopper() is not None
    )


def _assign_hopper(x: Tensor, centroids: Tensor, metric: Metric) -> Tensor:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Described

    kernel = _hopper()
    batch, n_points, dim = x.shape
    block_n, block_k = kernel.BLOCK_N, kernel.BLOCK_K
    tile = launch_config.Tile(
        block_n=block_n, block_k=block_k, block_d=dim, warps=4, stages=kernel.STAGES
    )
    directions, _, bias, _, k_tiles, _ = _padded(centroids, metric, tile)
    dtype = kernel.gl.float16 if x.dtype == torch.float16 else kernel.gl.bfloat16
    rows = x.as_strided((batch * n_points, dim), (x.stride(1), 1))
    points = Described.from_tensor(rows, [block_n, dim], kernel.shared_layout(block_n, dtype))
    source = Described.from_tensor(
        directions.view(-1, dim), [block_k, dim], kernel.shared_layout(block_k, dtype)
    )
    labels = torch.empty(batch, n_points, dtype=torch.int32, device=x.device)
    n_tiles = triton.cdiv(n_points, block_n * kernel.GROUPS)
    total = batch * n_tiles
    chips = torch.cuda.get_device_properties(x.device).multi_processor_count
    kernel.assign_kernel[(min(chips, total),)](
        points, source, bias, labels, n_points, n_tiles, k_tiles, total,
        BLOCK_N=block_n, BLOCK_K=block_k, D=dim, STAGES=kernel.STAGES, GROUPS=kernel.GROUPS,
        num_warps=kernel.WARPS,
    )  # fmt: skip
    return labels


def _sort(labels: Tensor, n_clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the stable order by label, sizes, and the first position of each cluster."""
    batch, n_points = labels.shape
    chunk = min(_CHUNK, launch_config.next_power(n_points, 16))
    chunks = triton.cdiv(n_points, chunk)
    starts = labels.new_empty(batch, n_clusters + 1)
    wide = min(1024, launch_config.next_power(n_clusters, 16))
    if batch * chunks * n_clusters > _MOST_COUNTERS or n_clusters * chunk > 2**31 - 2 * chunk:
        order, sizes = common.sort_by_label(labels, n_clusters)
        ordering.starts_kernel[(batch,)](sizes, starts, n_clusters, BLOCK_K=wide)
        return order, sizes, starts
    keys = labels.new_empty(batch * chunks, chunk)
    ranks = keys.new_empty(keys.shape, dtype=torch.int16)
    counts = labels.new_empty(batch * chunks, n_clusters)
    sizes, order = labels.new_empty(batch, n_clusters), torch.empty_like(labels)
    ordering.sort_chunks_kernel[(batch * chunks,)](
        labels, keys, ranks, counts, n_points, n_clusters, chunks,
        CHUNK=chunk, BLOCK_K=wide, num_warps=1,
    )  # fmt: skip
    block = min(64, wide)
    blocks = triton.cdiv(n_clusters, block)
    ordering.scan_chunks_kernel[(batch * blocks,)](
        counts, sizes, n_clusters, chunks, blocks, BLOCK_C=32, BLOCK_K=block, num_warps=4
    )
    ordering.starts_kernel[(batch,)](sizes, starts, n_clusters, BLOCK_K=wide)
    ordering.place_kernel[(batch * chunks,)](
        keys, ranks, counts, starts, order, n_points, n_clusters, chunks, CHUNK=chunk, num_warps=4
    )
    return order, sizes, starts


def _finish(
    x: Tensor,
    labels: Tensor,
    previous: Tensor,
    metric: Metric,
    scale: Tensor | None,
    weight: Tensor | None,
    *,
    cost: bool,
    raw: bool,
) -> tuple[Tensor, ...]:
    """Sum points per cluster and finish centroids; see the callers for what comes back."""
    x, labels, previous = _rows(x), labels.contiguous(), previous.contiguous()
    batch, n_points, dim = x.shape
    n_clusters = previous.shape[1]
    order, sizes, starts = _sort(labels, n_clusters)
    spans = triton.cdiv(n_points, _SPAN)
    block_d = min(256, launch_config.next_power(dim))
    block_n = max(1, min(64, 4096 // (block_d * x.element_size())))
    d_blocks = triton.cdiv(dim, block_d)
    floats = partial(torch.empty, dtype=torch.float32, device=x.device)
    wide = partial(torch.empty, dtype=common.sum_dtype(x), device=x.device)
    accumulator = tl.float32 if common.sum_dtype(x) == torch.float32 else tl.float64
    sums, pieces = (wide(batch, n, dim) for n in (n_clusters, 2 * spans))
    empty = wide(0)
    weighted = weight is not None
    totals, piece_totals = (wide(batch, n) if weighted else empty for n in (n_clusters, 2 * spans))
    by_distance = cost and metric != "dot"
    costs = floats(batch, spans * d_blocks) if by_distance else empty
    # What "cosine" compares has unit length; its centroids have it only up to rounding.
    compared = F.normalize(previous.float(), dim=-1) if cost and metric == "cosine" else previous
    updating.segment_sums_kernel[(batch * spans, d_blocks)](
        x, order, labels, starts, empty if scale is None else scale,
        empty if weight is None else weight, compared,
        sums, totals, pieces, piece_totals, costs,
        n_points, n_clusters, spans, x.stride(0), x.stride(1),
        D=dim, SPAN=_SPAN, BLOCK_N=block_n, BLOCK_D=block_d, SUM=accumulator,
        SCALED=scale is not None, WEIGHTED=weighted, WITH_COST=by_distance, num_warps=1,
    )  # fmt: skip
    centroids = empty if raw else torch.empty_like(previous)
    raw_sums = wide(batch, n_clusters, dim) if raw else empty
    raw_totals = wide(batch, n_clusters) if raw else empty
    changes = wide(batch, n_clusters) if cost else empty
    width = launch_config.next_power(dim)
    updating.finish_kernel[(batch * n_clusters,)](
        starts, previous, sums, totals, pieces, piece_totals,
        centroids, raw_sums, raw_totals, changes, n_clusters, spans,
        D=dim, SPAN=_SPAN, BLOCK_P=max(1, min(8, 2048 // width)), BLOCK_D=width, SUM=accumulator,
        METRIC=metric, WEIGHTED=weighted, WITH_COST=cost, RAW=raw,
        num_warps=max(1, min(8, width // 512)),
    )  # fmt: skip
    if raw:
        return raw_sums, raw_totals, sizes
    return centroids, sizes, order, costs, changes


def update(
    x: Tensor, labels: Tensor, previous: Tensor, metric: Metric, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return centroids, sizes and order."""
    scale, mass = common.point_weights(x, metric, weight)
    centroids, sizes, order, _, _ = _finish(
        x, labels, previous, metric, scale, mass, cost=False, raw=False
    )
    return centroids, sizes, order


def accumulate(
    x: Tensor, labels: Tensor, n_clusters: int, scale: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums `[B, K, D]`, total weights `[B, K]` and sizes `[B, K]` per cluster."""
    like = x[:, :1].expand(-1, n_clusters, -1)
    sums, totals, sizes = _finish(x, labels, like, "euclidean", scale, weight, cost=False, raw=True)
    return sums, totals, sizes


def lloyd(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None,
    metric: Metric,
    empty: str,
    rounds: int,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run `rounds` rounds; return labels, centroids, sizes, order and inertia."""
    current = centroids.contiguous()
    scale, mass = common.point_weights(x, metric, weight)
    for i in range(rounds):
        labels = assign(x, current, metric, tf32=tf32)
        if empty == "farthest":
            labels = common.relabel_farthest(x, labels, current, metric, weight)
        current, sizes, order, costs, changes = _finish(
            x, labels, current, metric, scale, mass, cost=i == rounds - 1, raw=False
        )
    inertia = changes.sum(1, dtype=torch.float64)
    if metric != "dot":
        inertia = inertia + costs.sum(1, dtype=torch.float64)
    if scale is not None:
        # Half the squared distance of unit vectors, and one for a point without direction.
        lost = (scale == 0).double() if weight is None else (scale == 0) * weight.double()
        inertia = inertia / 2 + lost.sum(1)
    return labels, current, sizes, order, inertia.to(torch.float32)


__all__ = ["accumulate", "assign", "capability", "lloyd", "update"]
