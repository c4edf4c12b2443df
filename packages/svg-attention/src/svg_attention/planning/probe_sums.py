"""Measuring, on the device, what probes lose where clusters of keys are replaced by their means."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from svg_attention._ops import define_op
from svg_attention.errors import UnsupportedError
from svg_attention.planning import cuda
from svg_attention.planning.dispatch import select_planner
from svg_attention.planning.probes import check_clusters, check_rows, empty_shares


class ProbeSums(NamedTuple):
    """What one pass of the probes over the keys finds.

    Attributes:
        error: fp32 `[B, H, T, C]`, squared error, per key, of replacing a cluster by its centroid.
        bias: fp32 `[B, H, T, C]`, what the logarithm of the centroid's weight lacks, at least 0.
        output: fp32 `[B, H, P, Dv]`, the attention output of each probe, or None.
        lse: fp32 `[B, H, P]`, natural logarithm of each probe's softmax denominator, or None.
    """

    error: Tensor
    bias: Tensor
    output: Tensor | None
    lse: Tensor | None


def probe_sums(
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
    return_output: bool = False,
    backend: str = "auto",
) -> ProbeSums:
    """Attend with every probe to every key, and measure what centroids lose.

    Of cluster `c`, with `n` keys `k_j` and values `v_j`, mean key `k_c` and mean value `v_c`, a
    probe with mean query `q` finds, with `Z = sum_j exp(q . k_j scale)` over all keys,

    - error: `1 / n * sum_(j in c) | exp(q . k_c scale) v_c - exp(q . k_j scale) v_j |^2 / Z^2`,
      values taken relative to their mean over the head, since a constant added to every value
      changes no error of a softmax; a tile averages its probes, weighed by their rows;
    - bias: `log(1 / n * sum_(j in c) exp(q . k_j scale)) - q . k_c scale`, at least 0 by Jensen's
      inequality and at most 8; a tile weighs it by the mass of the cluster as well.

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
        return_output: also return each probe's output and log-sum-exp.
        backend: `"auto"`, `"cuda"` (the kernel of `svg_kernels`, compute capability 9.0, bf16),
            `"triton"` or `"reference"`.

    Returns:
        A `ProbeSums`, 0 for an empty cluster.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device.

    Source: error SVG-EAR, arXiv:2603.08982 (value-aware relaxed error), per probe of a query tile.
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
    if backend == "auto" and cuda.unsupported(means, key, value, probe_rows) is None:
        backend = "cuda"
    error, bias, output, lse = _probe_sums(
        *tensors, length, probe_rows, float(scale), return_output, backend
    )
    return ProbeSums(error, bias, *((output, lse) if return_output else (None, None)))


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *operands, backend = arguments
    means, key, value, probe_rows = operands[0], operands[1], operands[2], operands[8]
    if backend == "cuda":
        reason = cuda.unsupported(means, key, value, probe_rows)
        if reason is not None:
            raise UnsupportedError({"cuda": reason})
        found: tuple[Tensor, Tensor, Tensor, Tensor] = cuda.probe_sums(*operands)
    else:
        found = select_planner(backend, means.device).probe_sums(*operands)
    return found


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    means, value, centroids = arguments[0], arguments[2], arguments[4]
    probe_rows, return_output = arguments[8], arguments[10]
    shares = empty_shares(means, centroids, probe_rows)
    rows = means.shape[:3] if return_output else (0,)
    output, lse = (
        means.new_empty(shape, dtype=torch.float32) for shape in ((*rows, value.shape[-1]), rows)
    )
    return shares, torch.empty_like(shares), output, lse


_probe_sums = define_op(
    "probe_sums",
    "(Tensor means, Tensor key, Tensor value, Tensor order, Tensor centroids, Tensor value_means,"
    " Tensor sizes, int length, int probe_rows, float scale, bool return_output, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
