"""Block-sparse attention: each tile of query rows reads its own runs of key rows."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from svg_kernels import _debug
from svg_kernels._dispatch import define_op, select_backend
from svg_kernels.attention.limits import unsupported
from svg_kernels.attention.operands import (
    TILE_ROWS,
    Operands,
    Summary,
    check_indices,
    check_operands,
    check_out,
)

__all__ = ["TILE_ROWS", "block_sparse_attention", "unsupported"]


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
        value: as `key`. What a tile does not read, NaN and infinity included, never reaches its
            rows.
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
        out: where to write the output, shaped and typed as `query`; None allocates. Any strides
            will do if the last axis is contiguous: a `[B, Sq, H, D]` buffer seen as
            `[B, H, Sq, D]` is filled in place. It must not overlap the inputs.
        backend: `"auto"`, `"cuda"` (compute capability 9.0, D of 64 or 128, 16-bit), `"triton"`
            or `"reference"`.

    Returns:
        `out`, or a contiguous tensor shaped and typed as `query`, tokens in the given order; with
        `return_lse` also fp32 `[B, H, Sq]`, minus infinity for a row that reads nothing. For
        inference only. Never waits for the device.

    Raises:
        TypeError: if a dtype is unsupported.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run this call here; it lists each backend's reason.

    Source: Yang et al. 2025, arXiv:2505.18875, section 3.3 (variable block sizes); online softmax
    of Dao 2023, arXiv:2307.08691.
    """
    operands = check_operands(
        query, key, value, run_starts, run_lengths, query_order, summary, tile_order, scale
    )
    if out is None:
        out, lse = _attend(*operands, return_lse, backend)
    else:
        check_out(out, query)
        lse = _attend_into(*operands, return_lse, backend, out)
    return (out, lse) if return_lse else out


def _outputs(query: Tensor, return_lse: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shape = query.shape[:3] if return_lse else (0,)
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, torch.empty(shape, dtype=torch.float32, device=query.device)


def _compute(
    operands: Operands, return_lse: bool, backend: str, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    query = operands.query
    module = select_backend(
        __name__, backend, query.device, query.dtype, query.shape[-1], unsupported=unsupported
    )
    out, lse = _outputs(query, return_lse, out)
    if _debug.ENABLED:
        check_indices(operands)
    if out.numel():
        module.block_sparse_attention(operands, out, lse if return_lse else None)
    return out, lse


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    *operands, return_lse, backend = arguments
    return _compute(Operands(*operands), return_lse, backend)


def _run_into(*arguments: Any) -> Tensor:
    *operands, return_lse, backend, out = arguments
    return _compute(Operands(*operands), return_lse, backend, out)[1]


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    *operands, return_lse, _ = arguments
    return _outputs(Operands(*operands).query, return_lse)


def _fake_into(*arguments: Any) -> Tensor:
    return _fake(*arguments[:-1])[1]


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor run_starts, Tensor run_lengths,"
    " Tensor? query_order, Tensor? summary_keys, Tensor? summary_values, Tensor? summary_weights,"
    " Tensor? tile_order, float scale, bool return_lse, str backend"
)
_attend = define_op("block_sparse_attention", f"({_ARGUMENTS}) -> (Tensor, Tensor)", _run, _fake)
_attend_into = define_op(
    "block_sparse_attention_into",
    f"({_ARGUMENTS}, Tensor(a!) out) -> Tensor",
    _run_into,
    _fake_into,
)
