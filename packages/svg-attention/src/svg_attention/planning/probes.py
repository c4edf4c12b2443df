"""Probing, on the device, how much each tile of queries attends to each cluster of keys.

A probe is `probe_rows` consecutive rows of the query order, and stands for them by their mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svg_attention._ops import define_op
from svg_attention.planning.dispatch import planner_name, select_planner
from svg_attention.tiles import TILE_ROWS, count_tiles


def probe_means(
    query: Tensor, order: Tensor, *, probe_rows: int = 16, backend: str = "auto"
) -> Tensor:
    """Average queries, gathered in the given order, `probe_rows` at a time.

    Args:
        query: `[B, H, S, D]`, floating; strided views are read as they are. Triton takes fp16,
            bf16 and fp32, D at most 256.
        order: int32 `[B, H, N]`, rows of `query`.
        probe_rows: rows of a probe; divides 128.
        backend: `"auto"`, `"triton"` or `"reference"`.

    Returns:
        `[B, H, T * probes, D]`, `T = ceil(N / 128)`, tile by tile; summed in fp32 and, by Triton,
        rounded to the dtype of `query`. The last probe with rows is averaged over its own; those
        after it are 0.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device.
    """
    check_rows("query", query, probe_rows)
    if order.dtype != torch.int32:
        raise TypeError(f"order must be int32, got {order.dtype}; use order.int()")
    if order.ndim != 3 or order.shape[:2] != query.shape[:2] or order.device != query.device:
        raise ValueError(
            f"order must be {[*query.shape[:2], 'N']} on {query.device}, "
            f"got {list(order.shape)} on {order.device}"
        )
    means: Tensor = _probe_means(query, order, probe_rows, backend)
    return means


def probe_mass(
    means: Tensor,
    centroids: Tensor,
    sizes: Tensor,
    *,
    length: int,
    probe_rows: int = 16,
    scale: float,
    per_key: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Estimate the share of each tile's attention that goes to each cluster of keys.

    A probe with mean query `q` gives cluster `j` the share
    `n_j exp(q . k_j scale) / sum_i n_i exp(q . k_i scale)`; a tile averages its probes, weighed by
    their rows. Products are accumulated in fp32.

    Args:
        means: `[B, H, T * probes, D]`, from `probe_means`.
        centroids: `[B, Hk, C, D]`, floating; H is a multiple of Hk.
        sizes: int32 `[B, Hk, C]`, keys of each cluster.
        length: rows that were probed.
        probe_rows: rows of a probe.
        scale: factor of the logits.
        per_key: divide each share by the keys of its cluster.
        backend: `"auto"`, `"triton"` or `"reference"`.

    Returns:
        fp32 `[B, H, T, C]`; sums to 1 over `C` (unless `per_key`) and is 0 for an empty cluster.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device.

    Source: Yang et al. 2025, arXiv:2505.18875, section 3.2, with several means to a tile.
    """
    check_rows("means", means, probe_rows)
    check_clusters(means, centroids, sizes, length, probe_rows)
    mass: Tensor = _probe_mass(
        means, centroids, sizes, length, probe_rows, float(scale), per_key, backend
    )
    return mass


def check_rows(name: str, x: Tensor, probe_rows: int) -> None:
    """Raise unless `x` is `[B, H, N, D]` and a probe can have so many rows."""
    if x.ndim != 4:
        raise ValueError(f"{name} must be [B, H, N, D], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating, got {x.dtype}; convert it first")
    if not 1 <= probe_rows <= TILE_ROWS or TILE_ROWS % probe_rows:
        raise ValueError(f"probe_rows must divide {TILE_ROWS}, got {probe_rows}")


def check_clusters(
    means: Tensor, centroids: Tensor, sizes: Tensor, length: int, probe_rows: int
) -> None:
    """Raise unless means, centroids and sizes fit each other and the rows that were probed."""
    batch, heads, found, width = means.shape
    probes = count_tiles(length) * (TILE_ROWS // probe_rows)
    if found != probes:
        raise ValueError(f"{length} rows are {probes} probes of {probe_rows} rows, got {found}")
    shape = tuple(centroids.shape)
    if (
        len(shape) != 4
        or (shape[0], shape[3]) != (batch, width)
        or not shape[1]
        or heads % shape[1]
    ):
        raise ValueError(
            f"centroids must be [{batch}, Hk, C, {width}] with Hk a divisor of {heads}, "
            f"got {list(shape)}"
        )
    if not centroids.is_floating_point() or sizes.dtype != torch.int32:
        raise TypeError(
            f"centroids must be floating and sizes int32, got {centroids.dtype} and {sizes.dtype}"
        )
    if tuple(sizes.shape) != shape[:3]:
        raise ValueError(f"sizes must be {list(shape[:3])}, got {list(sizes.shape)}")
    if centroids.device != means.device or sizes.device != means.device:
        raise ValueError(f"centroids and sizes must be on {means.device} like means")


def _run_means(query: Tensor, order: Tensor, probe_rows: int, backend: str) -> Tensor:
    means: Tensor = select_planner(backend, query.device).probe_means(query, order, probe_rows)
    return means


def _run_mass(*arguments: Any) -> Tensor:
    *operands, backend = arguments
    mass: Tensor = select_planner(backend, operands[0].device).probe_mass(*operands)
    return mass


def empty_shares(means: Tensor, centroids: Tensor, probe_rows: int) -> Tensor:
    """Allocate one fp32 number for each tile and cluster, `[B, H, T, C]`."""
    tiles = means.shape[2] * probe_rows // TILE_ROWS
    return means.new_empty(*means.shape[:2], tiles, centroids.shape[2], dtype=torch.float32)


def _fake_means(query: Tensor, order: Tensor, probe_rows: int, backend: str) -> Tensor:
    probes = count_tiles(order.shape[2]) * (TILE_ROWS // probe_rows)
    triton = planner_name(backend, query.device) == "triton"
    dtype = query.dtype if triton else torch.float32
    return query.new_empty(*query.shape[:2], probes, query.shape[3], dtype=dtype)


def _fake_mass(*arguments: Any) -> Tensor:
    means, centroids, probe_rows = arguments[0], arguments[1], arguments[4]
    return empty_shares(means, centroids, probe_rows)


_probe_means = define_op(
    "probe_means",
    "(Tensor query, Tensor order, int probe_rows, str backend) -> Tensor",
    _run_means,
    _fake_means,
)
_probe_mass = define_op(
    "probe_mass",
    "(Tensor means, Tensor centroids, Tensor sizes, int length, int probe_rows, float scale,"
    " bool per_key, str backend) -> Tensor",
    _run_mass,
    _fake_mass,
)
