"""What a block-sparse attention call works on, and the checks that it fits together."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from svg_kernels import _debug
from svg_kernels._checks import FLOATS, check_tensor
from svg_kernels.attention.limits import MAX_HEAD_DIM

TILE_ROWS = 128

Summary = tuple[Tensor, Tensor, Tensor]


class Operands(NamedTuple):
    """The inputs of one call in the order of the operator's schema, which describes them."""

    query: Tensor
    key: Tensor
    value: Tensor
    run_starts: Tensor
    run_lengths: Tensor
    query_order: Tensor | None
    summary_keys: Tensor | None
    summary_values: Tensor | None
    summary_weights: Tensor | None
    tile_order: Tensor | None
    scale: float


def check_operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    run_starts: Tensor,
    run_lengths: Tensor,
    query_order: Tensor | None,
    summary: Summary | None,
    tile_order: Tensor | None,
    scale: float | None,
) -> Operands:
    """Return the operands of a call, or say what does not fit.

    Raises:
        TypeError: if a dtype is unsupported.
        ValueError: if a shape or the scale does not fit or the devices differ.
    """
    for name, x in (
        *(("query", query), ("key", key), ("value", value)),
        *(("run_starts", run_starts), ("run_lengths", run_lengths)),
    ):
        check_tensor(name, x)
    _check_tensors(query, key, value)
    batch, heads, length, width = query.shape
    tiles = (length + TILE_ROWS - 1) // TILE_ROWS
    runs = run_starts.shape[-1] if run_starts.ndim else 0
    _check_index("run_starts", run_starts, (batch, heads, tiles, runs), query)
    _check_index("run_lengths", run_lengths, (batch, heads, tiles, runs), query)
    if query_order is not None:
        _check_index("query_order", query_order, (batch, heads, length), query)
    if tile_order is not None:
        _check_index("tile_order", tile_order, (batch * heads * tiles,), query)
    scale = width**-0.5 if scale is None else float(scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number above 0, got {scale}")
    return Operands(
        query,
        key,
        value,
        run_starts,
        run_lengths,
        query_order,
        *_check_summary(summary, query, key, tiles),
        tile_order,
        scale,
    )


def check_indices(operands: Operands) -> None:
    """Raise ValueError unless orders are permutations and runs lie apart within the keys.

    Waits for the device, and is done with `SVG_DEBUG=1` only.
    """
    query, order, tiles = operands.query, operands.query_order, operands.tile_order
    _debug.check_runs(operands.run_starts, operands.run_lengths, operands.key.shape[2])
    if order is not None:
        _debug.check_order("query_order", order, query.shape[2], permutation=True)
    if tiles is not None:
        _debug.check_order("tile_order", tiles, tiles.shape[0], permutation=True)


def check_out(out: Tensor, query: Tensor) -> None:
    """Raise ValueError unless the output of a call with this query can be written to `out`."""
    if out.shape != query.shape or out.dtype != query.dtype or out.device != query.device:
        raise ValueError(
            f"out must be {_shape(query)}, {query.dtype}, on {query.device} like query, "
            f"got {_shape(out)}, {out.dtype}, on {out.device}"
        )
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(
            f"the last axis of out must be contiguous, got strides {list(out.stride())}"
        )
    if any(size > 1 and step == 0 for size, step in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(
            f"out must have a place for every element, got strides {list(out.stride())}"
        )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, head_dim], got {_shape(x)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be fp16, bf16 or fp32, got {x.dtype}; convert it first")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must be {query.dtype} like query, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on {query.device} like query, got {x.device}")
    batch, heads, _, width = query.shape
    if not 1 <= width <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {MAX_HEAD_DIM}, got {width}")
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != width:
        raise ValueError(
            f"key and value must both be [{batch}, Hk, Sk, {width}] for query {_shape(query)}, "
            f"got {_shape(key)} and {_shape(value)}"
        )
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"{heads} query heads are not a multiple of {key.shape[1]} key heads")
    if key.shape[2] == 0:
        raise ValueError("key must have at least one row, got none")


def _check_index(name: str, x: Tensor, shape: tuple[int, ...], query: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {x.dtype}; use {name}.int()")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {_shape(x)}")
    if x.device != query.device:
        raise ValueError(f"{name} must be on {query.device} like query, got {x.device}")


def _check_summary(
    summary: Summary | None, query: Tensor, key: Tensor, tiles: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if summary is None:
        return None, None, None
    if not isinstance(summary, (tuple, list)) or len(summary) != 3:
        raise ValueError("summary must be (keys, values, log_weights) or None")
    keys, values, weights = summary
    for name, part in zip(("keys", "values", "log_weights"), summary, strict=True):
        check_tensor(f"summary {name}", part)
    batch, key_heads, _, width = key.shape
    count = keys.shape[2] if keys.ndim == 4 else 0
    for name, x, shape, dtype in (
        ("summary keys", keys, (batch, key_heads, count, width), query.dtype),
        ("summary values", values, (batch, key_heads, count, width), query.dtype),
        ("summary log_weights", weights, (*query.shape[:2], tiles, count), torch.float32),
    ):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {_shape(x)}")
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on {query.device} like query, got {x.device}")
    return (keys, values, weights) if count else (None, None, None)


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
