"""Block-sparse attention over keys in 8-bit integers."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from svg_kernels import _debug, _dispatch
from svg_kernels._dispatch import define_op, select_backend
from svg_kernels.attention import limits
from svg_kernels.attention.operands import (
    Operands,
    Summary,
    check_indices,
    check_operands,
    check_out,
)
from svg_kernels.key_int8.rows import Int8Key
from svg_kernels.rotation import HEAD_DIM

__all__ = ["block_sparse_attention_int8"]


@overload
def block_sparse_attention_int8(
    query: Tensor,
    key: Int8Key,
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
def block_sparse_attention_int8(
    query: Tensor,
    key: Int8Key,
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
def block_sparse_attention_int8(
    query: Tensor,
    key: Int8Key,
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


def block_sparse_attention_int8(
    query: Tensor,
    key: Int8Key,
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
    """Attend as `block_sparse_attention` does, with the scores from 8-bit integers.

    The compiled kernel rounds queries as well, after it has rotated them as the keys were, with a
    scale for each row. Scores are sums of integers, exact, at twice the rate of 16-bit products;
    probabilities and values stay in 16 bits, and so does the summary. The relative error of an
    output is about 1 % for random data and 0.2 to 0.4 % for trained queries and keys, where bf16
    has 0.15 and 0.04.

    Args:
        query: `[B, H, Sq, 128]`, fp16 or bf16; fp32 too for `"reference"`.
        key: what `quantize_key` returned for `[B, Hk, Sk, 128]` keys, in the order that the runs
            count in; H is a multiple of Hk.
        value: `[B, Hk, Sk, 128]`, in the same order and in the dtype of `query`.
        run_starts: see `block_sparse_attention`, as for all that follow.
        run_lengths: as there.
        query_order: as there.
        summary: as there, not quantised.
        tile_order: as there.
        scale: as there.
        return_lse: as there; the log-sum-exp is that of the rounded scores.
        out: as there.
        backend: `"auto"`, `"cuda"` (compute capability 9.0) or `"reference"`, which rounds keys
            only; there is no portable kernel.

    Returns:
        As `block_sparse_attention`.

    Raises:
        TypeError: if a dtype is unsupported.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run this call here; it lists each backend's reason.

    Source: Zhang et al. 2024, arXiv:2410.02367 (scores in 8-bit integers, the rest in 16 bits).
    """
    _check_key(key, query)
    # What the checks ask of keys in the dtype of the query.
    rows = query.new_empty(()).expand(key.key.shape)
    operands = check_operands(
        query, rows, value, run_starts, run_lengths, query_order, summary, tile_order, scale
    )
    integers, *scales = key.tensors
    arguments = (*operands._replace(key=integers), *scales, return_lse, backend)
    if out is None:
        out, lse = _attend(*arguments)
    else:
        check_out(out, query)
        lse = _attend_into(*arguments, out)
    return (out, lse) if return_lse else out


def unsupported(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return in a sentence why the backend `name` cannot compute such a call; None if it can.

    Args:
        name: `"cuda"`, `"triton"` or `"reference"`.
        device: where the tensors are.
        dtype: of the query.
        head_dim: D.
    """
    if head_dim != HEAD_DIM:
        return f"head_dim must be {HEAD_DIM} for keys in int8, got {head_dim}"
    if name == "triton":
        return "attention over keys in int8 is written for compute capability 9.0 alone"
    if name == "cuda":
        return limits.unsupported(name, device, dtype, head_dim)
    return _dispatch.unsupported(name, device)


def _check_key(key: Int8Key, query: Tensor) -> None:
    if not isinstance(key, Int8Key):
        raise TypeError(f"key must be what quantize_key returns, got {type(key).__name__}")
    integers = key.key
    if integers.ndim != 4 or integers.shape[-1] != HEAD_DIM:
        raise ValueError(f"key must hold [B, Hk, Sk, {HEAD_DIM}], got {list(integers.shape)}")
    if integers.dtype != torch.int8:
        raise TypeError(f"keys must be int8, got {integers.dtype}")
    channels = (*integers.shape[:2], HEAD_DIM)
    for name, shape in (
        ("row_scale", integers.shape[:3]),
        ("channel_scale", channels),
        ("mean", channels),
    ):
        x = getattr(key, name)
        if x.dtype != torch.float32 or x.shape != shape:
            raise ValueError(f"{name} must be fp32 {list(shape)}, got {x.dtype} {list(x.shape)}")
    for x in key.tensors:
        if x.device != query.device:
            raise ValueError(f"key must be on {query.device} like query, got {x.device}")


def _outputs(query: Tensor, return_lse: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shape = query.shape[:3] if return_lse else (0,)
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, torch.empty(shape, dtype=torch.float32, device=query.device)


def _compute(arguments: tuple[Any, ...], out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    *described, return_lse, backend = arguments
    operands, scales = Operands(*described[:-3]), tuple(described[-3:])
    query = operands.query
    module = select_backend(
        __name__, backend, query.device, query.dtype, query.shape[-1], unsupported=unsupported
    )
    out, lse = _outputs(query, return_lse, out)
    if _debug.ENABLED:
        check_indices(operands)
    if out.numel():
        module.block_sparse_attention_int8(operands, scales, out, lse if return_lse else None)
    return out, lse


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _compute(arguments)


def _run_into(*arguments: Any) -> Tensor:
    return _compute(arguments[:-1], arguments[-1])[1]


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _outputs(arguments[0], arguments[-2])


def _fake_into(*arguments: Any) -> Tensor:
    return _fake(*arguments[:-1])[1]


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor run_starts, Tensor run_lengths,"
    " Tensor? query_order, Tensor? summary_keys, Tensor? summary_values, Tensor? summary_weights,"
    " Tensor? tile_order, float scale, Tensor row_scale, Tensor channel_scale, Tensor mean,"
    " bool return_lse, str backend"
)
_attend = define_op(
    "block_sparse_attention_int8", f"({_ARGUMENTS}) -> (Tensor, Tensor)", _run, _fake
)
_attend_into = define_op(
    "block_sparse_attention_int8_into",
    f"({_ARGUMENTS}, Tensor(a!) out) -> Tensor",
    _run_into,
    _fake_into,
)
