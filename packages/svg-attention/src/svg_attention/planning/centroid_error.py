"""Estimating, on the device, what it costs to replace clusters of keys by their means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svg_attention._ops import define_op
from svg_attention.planning.dispatch import select_planner
from svg_attention.planning.probes import check_clusters, check_rows, empty_shares


def centroid_error(
    means: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    centroids: Tensor,
    value_means: Tensor,
    sizes: Tensor,
    *,
    length: int,
    probe_rows: int = 16,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """Estimate each tile's squared error, per key, of replacing a cluster by its centroid.

    A probe with mean query `q` gives cluster `c`, with mean key `k_c` and mean value `v_c`,

    `1 / n_c * sum_(j in c) | exp(q . k_c scale) v_c - exp(q . k_j scale) v_j |^2 / Z^2`,

    `Z = sum_j exp(q . k_j scale)` over all keys; a tile averages its probes, weighed by their rows.
    Values are taken relative to their mean over the head, since a constant added to every value
    changes no error of a softmax.

    Args:
        means: `[B, H, T * probes, D]`, from `probe_means`.
        key: `[B, Hk, N, D]`, floating; H is a multiple of Hk. Triton takes D and Dv up to 256.
        value: `[B, Hk, N, Dv]`, typed as `key`.
        order: int32 `[B, Hk, N]`, rows of `key` sorted by cluster.
        centroids: `[B, Hk, C, D]`, typed as `key`.
        value_means: `[B, Hk, C, Dv]`, typed as `key`.
        sizes: int32 `[B, Hk, C]`, keys of each cluster.
        length: rows that were probed.
        probe_rows: rows of a probe.
        scale: factor of the logits, above 0.
        backend: `"auto"`, `"triton"` or `"reference"`.

    Returns:
        fp32 `[B, H, T, C]`, 0 for an empty cluster.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device.

    Source: SVG-EAR, arXiv:2603.08982 (value-aware relaxed error), per probe of a query tile.
    """
    check_rows("means", means, probe_rows)
    check_clusters(means, centroids, sizes, length, probe_rows)
    batch, heads, count, width = centroids.shape
    rows, depth = order.shape[-1], value.shape[-1]
    for name, x, shape in (
        ("key", key, (batch, heads, rows, width)),
        ("value", value, (batch, heads, rows, depth)),
        ("value_means", value_means, (batch, heads, count, depth)),
        ("order", order, (batch, heads, rows)),
    ):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
        wanted = torch.int32 if name == "order" else key.dtype
        if x.dtype != wanted:
            raise TypeError(f"{name} must be {wanted}, got {x.dtype}; convert it first")
        if x.device != means.device:
            raise ValueError(f"{name} must be on {means.device} like means, got {x.device}")
    tensors = (means, key, value, order, centroids, value_means, sizes)
    errors: Tensor = _centroid_error(*tensors, length, probe_rows, float(scale), backend)
    return errors


def _run(*arguments: Any) -> Tensor:
    *operands, backend = arguments
    errors: Tensor = select_planner(backend, operands[0].device).centroid_error(*operands)
    return errors


def _fake(*arguments: Any) -> Tensor:
    means, centroids, probe_rows = arguments[0], arguments[4], arguments[8]
    return empty_shares(means, centroids, probe_rows)


_centroid_error = define_op(
    "centroid_error",
    "(Tensor means, Tensor key, Tensor value, Tensor order, Tensor centroids, Tensor value_means,"
    " Tensor sizes, int length, int probe_rows, float scale, str backend) -> Tensor",
    _run,
    _fake,
)
