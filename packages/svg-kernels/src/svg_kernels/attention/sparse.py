"""Variable-block sparse attention: the operation, its checks and its registration with torch."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from svg_kernels._backends import FLOATS, register
from svg_kernels.attention._tiers import MAX_HEAD_DIM, choose

TILE_ROWS = 128

Summary = tuple[Tensor, Tensor, Tensor]


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    run_starts: Tensor,
    run_lengths: Tensor,
    *,
    query_order: Tensor | None = None,
    summary: Summary | None = None,
    tile_order: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    run_starts: Tensor,
    run_lengths: Tensor,
    *,
    query_order: Tensor | None = None,
    summary: Summary | None = None,
    tile_order: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    run_starts: Tensor,
    run_lengths: Tensor,
    *,
    query_order: Tensor | None = None,
    summary: Summary | None = None,
    tile_order: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    run_starts: Tensor,
    run_lengths: Tensor,
    *,
    query_order: Tensor | None = None,
    summary: Summary | None = None,
    tile_order: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend, in each tile of 128 query rows, to that tile's runs of key rows.

    `out[i] = sum_j w_ij value[j]`, where `w_ij` is the softmax of `query[i] . key[j] * scale` over
    the rows `j` in the runs of the tile that holds row `i`. With a summary, each of its rows `c`
    takes part too, with the logit `query[i] . keys[c] * scale + log_weights[t, c]`. Products are
    accumulated in fp32 and rounded once. A row that reads nothing gives 0.

    A tile is 128 consecutive positions of the query order. Keys and values come already in the
    order that the runs count in (`permute_rows`); queries are gathered and outputs scattered here.

    Args:
        query: `[B, H, Sq, D]`, fp16, bf16 or fp32, D at most 256.
        key: `[B, Hk, Sk, D]`, typed as `query`; H is a multiple of Hk.
        value: as `key`. Rows that a tile does not read may still be multiplied by zero, so every
            row must be finite.
        run_starts: int32 `[B, H, T, R]`, T = ceil(Sq / 128): first row of each run.
        run_lengths: int32 `[B, H, T, R]`: its rows. The runs of a tile are disjoint and lie within
            `0 .. Sk - 1` (not checked on a GPU); used slots come first, 0 marks the unused.
        query_order: int32 `[B, H, Sq]`, a permutation for each head: the token at each position;
            None for the given order.
        summary: `(keys, values, log_weights)`: `[B, Hk, C, D]` twice, typed as `query`, and fp32
            `[B, H, T, C]`, natural logarithms; minus infinity leaves a row out.
        tile_order: int32 `[B * H * T]`, a permutation: the order in which tiles are started. It
            changes speed only.
        scale: factor of the logits, above 0; `D ** -0.5` when None.
        return_lse: also return the natural logarithm of each row's softmax denominator.
        out: where to write the output: contiguous, shaped and typed as `query`; None allocates.
        backend: `"auto"`, `"cuda"` (compute capability 9.0, D of 64 or 128, 16-bit), `"triton"`
            or `"reference"`.

    Returns:
        Tensor shaped and typed as `query`, contiguous, tokens in the given order; with
        `return_lse` also fp32 `[B, H, Sq]`, minus infinity for a row that reads nothing. For
        inference only. Never waits for the device.

    Raises:
        TypeError: if a dtype is unsupported.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run this call here; it lists each backend's reason.

    Source: Yang et al. 2025, arXiv:2505.18875, section 3.3 (variable block sizes); online softmax
    of Dao 2023, arXiv:2307.08691.
    """
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
    keys, values, weights = _check_summary(summary, query, key, tiles)
    scale = width**-0.5 if scale is None else float(scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number above 0, got {scale}")
    arguments = (
        query,
        key,
        value,
        run_starts,
        run_lengths,
        query_order,
        keys,
        values,
        weights,
        tile_order,
        scale,
        return_lse,
        backend,
    )
    if out is None:
        out, lse = _attend(*arguments)
    else:
        _check_out(out, query)
        lse = _attend_into(*arguments, out)
    return (out, lse) if return_lse else out


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
    if x.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {x.dtype}; use {name}.int()")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {_shape(x)}")
    if x.device != query.device:
        raise ValueError(f"{name} must be on {query.device} like query, got {x.device}")


def _check_out(out: Tensor, query: Tensor) -> None:
    if out.shape != query.shape or out.dtype != query.dtype or out.device != query.device:
        raise ValueError(
            f"out must be {_shape(query)}, {query.dtype}, on {query.device} like query, "
            f"got {_shape(out)}, {out.dtype}, on {out.device}"
        )
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {list(out.stride())}")


def _check_summary(
    summary: Summary | None, query: Tensor, key: Tensor, tiles: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if summary is None:
        return None, None, None
    keys, values, weights = summary
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


def _outputs(query: Tensor, return_lse: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shape = query.shape[:3] if return_lse else (0,)
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, torch.empty(shape, dtype=torch.float32, device=query.device)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    run_starts: Tensor,
    run_lengths: Tensor,
    query_order: Tensor | None,
    summary_keys: Tensor | None,
    summary_values: Tensor | None,
    summary_weights: Tensor | None,
    tile_order: Tensor | None,
    scale: float,
    return_lse: bool,
    backend: str,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    tier = choose(backend, query.device, query.dtype, query.shape[-1])
    out, lse = _outputs(query, return_lse, out)
    if out.numel():
        tier.block_sparse_attention(
            query,
            key,
            value,
            run_starts,
            run_lengths,
            query_order,
            summary_keys,
            summary_values,
            summary_weights,
            tile_order,
            scale,
            out,
            lse if return_lse else None,
        )
    return out, lse


def _run_into(*arguments: Any) -> Tensor:
    return _run(*arguments)[1]


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    run_starts: Tensor,
    run_lengths: Tensor,
    query_order: Tensor | None,
    summary_keys: Tensor | None,
    summary_values: Tensor | None,
    summary_weights: Tensor | None,
    tile_order: Tensor | None,
    scale: float,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _outputs(query, return_lse)


def _fake_into(*arguments: Any) -> Tensor:
    return _outputs(arguments[0], arguments[-3])[1]


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor run_starts, Tensor run_lengths,"
    " Tensor? query_order, Tensor? summary_keys, Tensor? summary_values, Tensor? summary_weights,"
    " Tensor? tile_order, float scale, bool return_lse, str backend"
)
_attend = register("block_sparse_attention", f"({_ARGUMENTS}) -> (Tensor, Tensor)", _run, _fake)
_attend_into = register(
    "block_sparse_attention_into",
    f"({_ARGUMENTS}, Tensor(a!) out) -> Tensor",
    _run_into,
    _fake_into,
)
