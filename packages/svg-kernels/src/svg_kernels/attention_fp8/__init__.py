"""Block-sparse attention over keys and values in e4m3."""

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
from svg_kernels.key_value_fp8.rows import DTYPE, HEAD_DIM, Fp8KeyValue

__all__ = ["block_sparse_attention_fp8"]


@overload
def block_sparse_attention_fp8(
    query: Tensor,
    key_value: Fp8KeyValue,
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
def block_sparse_attention_fp8(
    query: Tensor,
    key_value: Fp8KeyValue,
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
def block_sparse_attention_fp8(
    query: Tensor,
    key_value: Fp8KeyValue,
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


def block_sparse_attention_fp8(
    query: Tensor,
    key_value: Fp8KeyValue,
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
    """Attend as `block_sparse_attention` does, with both products in e4m3.

    The compiled kernel rounds queries and probabilities as well; a query is rounded after it has
    been rotated as the keys were, with a scale for each row, probabilities after they have been
    scaled to e4m3's range. The relative error of an output row is about 5 % for random data, where
    bf16 has 0.3 %. The summary stays in the dtype of `query`.

    Args:
        query: `[B, H, Sq, 128]`, fp16 or bf16; fp32 too for `"reference"`.
        key_value: what `quantize_key_value` returned for `[B, Hk, Sk, 128]` keys and values, in the
            order that the runs count in; H is a multiple of Hk.
        run_starts: see `block_sparse_attention`, as for all that follow.
        run_lengths: as there.
        query_order: as there.
        summary: as there, not quantised.
        tile_order: as there.
        scale: as there.
        return_lse: as there; the log-sum-exp is that of the rounded scores.
        out: as there.
        backend: `"auto"`, `"cuda"` (compute capability 9.0) or `"reference"`, which rounds keys and
            values only; there is no portable kernel.

    Returns:
        As `block_sparse_attention`.

    Raises:
        TypeError: if a dtype is unsupported.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run this call here; it lists each backend's reason.

    Source: Shah et al. 2024, arXiv:2407.08608, section 3.3 (layouts in 8 bits); Zhang et al. 2024,
    arXiv:2411.10958 (sums promoted to fp32).
    """
    _check_key_value(key_value, query)
    # What the checks ask of keys and values in the dtype of the query.
    rows = query.new_empty(()).expand(key_value.key.shape)
    operands = check_operands(
        query, rows, rows, run_starts, run_lengths, query_order, summary, tile_order, scale
    )
    key, value, *scales = key_value.tensors
    arguments = (*operands._replace(key=key, value=value), *scales, return_lse, backend)
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
        return f"head_dim must be {HEAD_DIM} for keys in e4m3, got {head_dim}"
    if name == "triton":
        return "attention in e4m3 is written for compute capability 9.0 alone"
    if name == "cuda":
        return limits.unsupported(name, device, dtype, head_dim)
    return _dispatch.unsupported(name, device)


def _check_key_value(key_value: Fp8KeyValue, query: Tensor) -> None:
    if not isinstance(key_value, Fp8KeyValue):
        raise TypeError(
            f"key_value must be what quantize_key_value returns, got {type(key_value).__name__}"
        )
    key = key_value.key
    if key.ndim != 4 or key.shape[-1] != HEAD_DIM or key_value.value.shape != key.shape:
        raise ValueError(
            f"key_value must hold keys and values [B, Hk, Sk, {HEAD_DIM}], "
            f"got {list(key.shape)} and {list(key_value.value.shape)}"
        )
    if key.dtype != DTYPE or key_value.value.dtype != DTYPE:
        raise TypeError(f"keys and values must be {DTYPE}, got {key.dtype}")
    shape = (*key.shape[:2], HEAD_DIM)
    for x in key_value.tensors[2:]:
        if x.dtype != torch.float32 or tuple(x.shape) != shape:
            raise ValueError(
                f"scales and means must be fp32 {list(shape)}, got {x.dtype} {list(x.shape)}"
            )
    for x in key_value.tensors:
        if x.device != query.device:
            raise ValueError(f"key_value must be on {query.device} like query, got {x.device}")


def _outputs(query: Tensor, return_lse: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shape = query.shape[:3] if return_lse else (0,)
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, torch.empty(shape, dtype=torch.float32, device=query.device)


def _compute(arguments: tuple[Any, ...], out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    *described, return_lse, backend = arguments
    operands, scales = Operands(*described[:-4]), tuple(described[-4:])
    query = operands.query
    module = select_backend(
        __name__, backend, query.device, query.dtype, query.shape[-1], unsupported=unsupported
    )
    out, lse = _outputs(query, return_lse, out)
    if _debug.ENABLED:
        check_indices(operands)
    if out.numel():
        module.block_sparse_attention_fp8(operands, scales, out, lse if return_lse else None)
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
    " Tensor? tile_order, float scale, Tensor key_scale, Tensor key_mean, Tensor value_scale,"
    " Tensor value_mean, bool return_lse, str backend"
)
_attend = define_op(
    "block_sparse_attention_fp8", f"({_ARGUMENTS}) -> (Tensor, Tensor)", _run, _fake
)
_attend_into = define_op(
    "block_sparse_attention_fp8_into",
    f"({_ARGUMENTS}, Tensor(a!) out) -> Tensor",
    _run_into,
    _fake_into,
)
