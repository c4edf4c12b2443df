"""Attention of probes over every key, with what each segment of the keys would lose by its mean."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svg_kernels import _debug
from svg_kernels._dispatch import define_op, select_backend
from svg_kernels.probe_sums.limits import TILE_ROWS, unsupported

__all__ = ["ProbeSums", "probe_sums", "unsupported"]


class ProbeSums(NamedTuple):
    """What one pass over the keys finds.

    Attributes:
        error: fp32 `[B, H, T, C]`, squared error, per key, of replacing segment `c` by its means.
        bias: fp32 `[B, H, T, C]`, what the logarithm of the weight of a mean key lacks, at least 0.
        output: fp32 `[B, H, P, D]`, attention output of each probe, or None.
        lse: fp32 `[B, H, P]`, natural logarithm of each probe's softmax denominator, or None.
    """

    error: Tensor
    bias: Tensor
    output: Tensor | None
    lse: Tensor | None


def probe_sums(
    probes: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    centroids: Tensor,
    value_means: Tensor,
    sizes: Tensor,
    *,
    length: int,
    probe_rows: int = 16,
    scale: float | None = None,
    return_output: bool = False,
    largest_bias: float = 8.0,
    backend: str = "auto",
) -> ProbeSums:
    """Attend with every probe to every key, and measure what segments of keys lose by their means.

    A probe `q` stands for `probe_rows` consecutive of `length` rows; a tile of 128 rows averages
    its probes, weighed by the rows they stand for. Of segment `c`, with `n` keys `k_j` and values
    `v_j`, mean key `k_c` and mean value `v_c`, a probe finds, with `Z = sum_j exp(q . k_j scale)`
    over all keys,

    - error: `1 / n * sum_(j in c) | exp(q . k_c scale) v_c - exp(q . k_j scale) v_j |^2 / Z^2`,
      values taken relative to their mean over the head;
    - bias: `log(1 / n * sum_(j in c) exp(q . k_j scale)) - q . k_c scale`, at least 0 by Jensen's
      inequality and cut off at `largest_bias`; a tile weighs it by the mass of the segment as well.

    Args:
        probes: `[B, H, P, D]`, fp16, bf16 or fp32, P = ceil(length / 128) * 128 / probe_rows.
        key: `[B, Hk, N, D]`, typed as `probes`; H is a multiple of Hk.
        value: as `key`.
        order: int32 `[B, Hk, N]`, rows of `key`, segment by segment.
        centroids: `[B, Hk, C, D]`, typed as `key`: the mean key of each segment.
        value_means: as `centroids`, of the values.
        sizes: int32 `[B, Hk, C]`, keys of each segment; they sum to N (not checked on a GPU).
        length: rows that probes stand for.
        probe_rows: rows of a probe; divides 128.
        scale: factor of the logits, above 0; `D ** -0.5` when None.
        return_output: also return each probe's output and log-sum-exp.
        largest_bias: bound of a probe's bias, in nats.
        backend: `"auto"`, `"cuda"` (compute capability 9.0, D of 64 or 128, bf16, probes of 8 rows
            or more) or `"reference"`.

    Returns:
        A `ProbeSums`; errors and biases of an empty segment are 0. For inference only. Never waits
        for the device.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or a number does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run this call here; it lists each backend's reason.

    Source: error SVG-EAR, arXiv:2603.08982 (value-aware relaxed error), per probe of a query tile.
    """
    tensors = (probes, key, value, order, centroids, value_means, sizes)
    _check(*tensors, length, probe_rows)
    scale = probes.shape[-1] ** -0.5 if scale is None else float(scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number above 0, got {scale}")
    if not largest_bias >= 0:
        raise ValueError(f"largest_bias must be at least 0, got {largest_bias}")
    error, bias, output, lse = _probe_sums(
        *tensors, length, probe_rows, scale, return_output, float(largest_bias), backend
    )
    return ProbeSums(error, bias, *((output, lse) if return_output else (None, None)))


def _check(
    probes: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    centroids: Tensor,
    value_means: Tensor,
    sizes: Tensor,
    length: int,
    probe_rows: int,
) -> None:
    if not 1 <= probe_rows <= TILE_ROWS or TILE_ROWS % probe_rows:
        raise ValueError(f"probe_rows must divide {TILE_ROWS}, got {probe_rows}")
    if probes.ndim != 4 or key.ndim != 4 or centroids.ndim != 4:
        raise ValueError(
            "probes, key and centroids must be [batch, heads, rows, head_dim], "
            f"got {list(probes.shape)}, {list(key.shape)} and {list(centroids.shape)}"
        )
    batch, heads, found, width = probes.shape
    expected = -(-length // TILE_ROWS) * (TILE_ROWS // probe_rows)
    if length < 0 or found != expected:
        raise ValueError(f"{length} rows are {expected} probes of {probe_rows} rows, got {found}")
    key_heads, rows, segments = key.shape[1], key.shape[2], centroids.shape[2]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{heads} heads of probes are not a multiple of {key_heads} key heads")
    if rows == 0 or segments == 0:
        raise ValueError(f"there must be keys in segments, got {rows} keys, {segments} segments")
    depth = value.shape[-1]
    for name, x, shape, dtype in (
        ("key", key, (batch, key_heads, rows, width), probes.dtype),
        ("value", value, (batch, key_heads, rows, depth), probes.dtype),
        ("order", order, (batch, key_heads, rows), torch.int32),
        ("centroids", centroids, (batch, key_heads, segments, width), probes.dtype),
        ("value_means", value_means, (batch, key_heads, segments, depth), probes.dtype),
        ("sizes", sizes, (batch, key_heads, segments), torch.int32),
    ):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {x.dtype}; convert it first")
        if x.device != probes.device:
            raise ValueError(f"{name} must be on {probes.device} like probes, got {x.device}")


def _outputs(
    probes: Tensor, value: Tensor, sizes: Tensor, probe_rows: int, return_output: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, count, _ = probes.shape
    shape = (batch, heads, count * probe_rows // TILE_ROWS, sizes.shape[-1])
    wanted = (batch, heads, count) if return_output else (0,)
    options: dict[str, Any] = {"dtype": torch.float32, "device": probes.device}
    return (
        torch.empty(shape, **options),
        torch.empty(shape, **options),
        torch.empty((*wanted, value.shape[-1]), **options),
        torch.empty(wanted, **options),
    )


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *operands, return_output, largest_bias, backend = arguments
    probes, key, value, order, _, _, sizes, _, probe_rows, _ = operands
    if _debug.ENABLED:
        _debug.check_order("order", order, key.shape[2], permutation=True)
        _debug.check_sizes("sizes", sizes, key.shape[2])
    module = select_backend(
        __name__,
        backend,
        probes.device,
        probes.dtype,
        (probes.shape[-1], value.shape[-1]),
        probe_rows,
        unsupported=unsupported,
    )
    outputs = _outputs(probes, value, sizes, probe_rows, return_output)
    if probes.numel():
        module.probe_sums(*operands, largest_bias, *outputs)
    return outputs


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    probes, value, sizes = arguments[0], arguments[2], arguments[6]
    return _outputs(probes, value, sizes, arguments[8], arguments[10])


_probe_sums = define_op(
    "probe_sums",
    "(Tensor probes, Tensor key, Tensor value, Tensor order, Tensor centroids, Tensor value_means,"
    " Tensor sizes, int length, int probe_rows, float scale, bool return_output,"
    " float largest_bias, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
