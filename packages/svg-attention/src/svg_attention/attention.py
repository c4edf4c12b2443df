"""Attention: dense, and as a plan says."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from svg_attention.backends import BACKENDS, Backend, select_backend
from svg_attention.corrections import add_first_order, add_residual, repair
from svg_attention.plan import SparsePlan
from svg_attention.rows import take_rows
from svg_attention.tiles import head_groups, match_heads

DENSE_BACKENDS = ("cuda", "sdpa")
# Bytes of queries with probes behind them that are copied at once.
PROBED_BYTES = 2**28
_dense_backends: dict[tuple[torch.device, torch.dtype, int, int], str] = {}


@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SparsePlan,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
    out: Tensor | None = None,
) -> Tensor: ...


@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SparsePlan,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SparsePlan,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the keys that a plan names.

    `out[i] = sum_j w_ij v_j` over the keys `j` that the tile of query `i` reads, where `w_ij` is
    the softmax over them of `query_i . key_j * scale`; with a summary, centroids take part for the
    others. Computed with fp32 accumulation. A query that reads nothing gives 0.

    Args:
        query: `[B, H, Sq, D]`, fp16, bf16 or fp32.
        key: `[B, H_kv, Sk, D]`, `H` a multiple of `H_kv`.
        value: `[B, H_kv, Sk, D]`.
        plan: which keys each query tile reads.
        scale: factor of the logits, `D ** -0.5` when None.
        backend: "auto" takes the best that can run, and for a full plan torch's own dense kernel;
            a name takes that backend or fails.
        return_lse: also return the natural logarithm of each row's softmax denominator.
        out: where to write the output: `[B, H, Sq, D]`, typed as `query`, of any strides, such as
            `torch.empty(B, Sq, H, D).transpose(1, 2)`; None allocates.

    Returns:
        `[B, H, Sq, D]` typed as `query` with the channels of `value`, tokens in the given order;
        with `return_lse` also fp32 `[B, H, Sq]`, minus infinity for a query that reads nothing.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit each other or the plan.
        RuntimeError: if a gradient would be needed: only the dense kernel of a full plan has one.
        UnsupportedError: if no allowed backend can run this call; it lists each one's reason.
    """
    check_tensors(query, key, value)
    check_plan(query, key, plan)
    if out is not None:
        check_out(out, query, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    chosen = select_backend(backend, query, key, value, plan)
    if plan.is_full and backend == "auto" and not return_lse:
        if plan.key_order is not None:
            order = match_heads(plan.key_order, key.shape[1])
            key, value = take_rows(key, order), take_rows(value, order)
        return dense_attention(
            query, key, value, key_lengths=plan.key_lengths, scale=scale, out=out
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise RuntimeError(
            "sparse attention has no gradient; run the model under torch.no_grad() or "
            "torch.inference_mode()"
        )
    if out is None:
        out = torch.empty(out_shape(query, value), dtype=query.dtype, device=query.device)
    if plan.residual is None:
        sloped = plan.summary is not None and plan.summary.slope is not None
        wanted = return_lse or sloped
        lse = chosen.attend(query, key, value, plan, out, scale=scale, return_lse=wanted)
        if sloped and lse is not None:
            add_first_order(out, lse, query, plan, scale)
    else:
        lse = _attend_with_probes(
            chosen, query, key, value, plan, out, scale=scale, return_lse=return_lse
        )
    if plan.exact_rows is not None:
        repair(out, query, plan.exact_rows)
    if not return_lse:
        return out
    if lse is None:
        raise RuntimeError(f"backend {chosen.name!r} returned no log-sum-exp")
    return out, lse


def _attend_with_probes(
    chosen: Backend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SparsePlan,
    out: Tensor,
    *,
    scale: float,
    return_lse: bool,
) -> Tensor | None:
    """Fill `out` as `Backend.attend` does, for queries with the probes of a residual behind them.

    Some heads at a time, since the queries are copied.
    """
    residual = plan.residual
    if residual is None:
        raise ValueError("the plan has no probes")
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if return_lse else None
    counts = (query.shape[0], query.shape[1], key.shape[1])
    head_bytes = plan.positions * query.shape[3] * query.itemsize * counts[1] // counts[2]
    for batch, heads, key_heads in head_groups(*counts, head_bytes, PROBED_BYTES):
        part = plan.part(batch, heads, key_heads, key.shape[1])
        probes = replace(
            residual,
            queries=residual.queries[batch, heads],
            outputs=residual.outputs[batch, heads],
        )
        queries = torch.cat([query[batch, heads], probes.queries], dim=2)
        keys, values = key[batch, key_heads], value[batch, key_heads]
        whole = queries.new_empty(out_shape(queries, values))
        found = chosen.attend(
            queries, keys, values, part, whole, scale=scale, return_lse=return_lse
        )
        add_residual(whole, part.query_order, probes, out[batch, heads])
        if lse is not None and found is not None:
            lse[batch, heads] = found[:, :, : plan.query_length]
    return lse


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Attend to every key.

    Args:
        query: `[B, H, Sq, D]`, fp16, bf16 or fp32.
        key: `[B, H_kv, Sk, D]`, `H` a multiple of `H_kv`.
        value: `[B, H_kv, Sk, D]`.
        key_lengths: integers `[B]`, only that many first keys of each batch item are read; None
            for all. A tensor on the CPU whose numbers agree costs nothing; otherwise a mask is
            passed, which rules out the fastest kernels.
        scale: factor of the logits, `D ** -0.5` when None.
        backend: "cuda", the kernel of svg-kernels for compute capability 9.0, which is faster than
            torch's there and takes `key_lengths` on the device without a mask; "sdpa", torch's
            `scaled_dot_product_attention`; or "auto", see `dense_backend`. Both compute the same
            within rounding.
        out: where to write the output, as for `sparse_attention`; for "sdpa" it is a copy. Without
            it the output lies in memory as `query` does wherever torch's kernel allows.

    Returns:
        `[B, H, Sq, D]` typed as `query` with the channels of `value`.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or the backend is unknown.
        UnsupportedError: if `backend="cuda"` cannot run here.
    """
    check_tensors(query, key, value)
    if out is not None:
        check_out(out, query, value)
    if backend not in ("auto", *DENSE_BACKENDS):
        known = ", ".join(["auto", *DENSE_BACKENDS])
        raise ValueError(f"unknown dense backend {backend!r}; choose one of {known}")
    if (dense_backend(query, key, value) if backend == "auto" else backend) == "cuda":
        batch, heads, length, _ = query.shape
        plan = SparsePlan.full(
            batch,
            heads,
            length,
            key.shape[2],
            key_lengths=None if key_lengths is None else key_lengths.to(query.device),
            device=query.device,
        )
        found: Tensor = sparse_attention(
            query, key, value, plan, scale=scale, backend="cuda", out=out
        )
        return found
    mask = None
    if key_lengths is not None:
        if key_lengths.device.type == "cpu" and len(set(key_lengths.tolist())) == 1:
            valid = int(key_lengths[0])
            key, value = key[:, :, :valid], value[:, :, :valid]
        else:
            place = torch.arange(key.shape[2], device=key.device)
            mask = (place < key_lengths.to(key.device)[:, None])[:, None, None]
    found = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return found if out is None else out.copy_(found)


def dense_backend(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Return what `dense_attention` takes for "auto": "cuda" where that can run, else "sdpa".

    Args:
        query: `[B, H, Sq, D]`; one that needs a gradient takes "sdpa".
        key: `[B, H_kv, Sk, D]`.
        value: `[B, H_kv, Sk, D]`.
    """
    if query.device.type != "cuda" or 0 in (*query.shape, *key.shape):
        return "sdpa"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "sdpa"
    traits = (query.device, query.dtype, query.shape[-1], value.shape[-1])
    if traits not in _dense_backends:
        plan = SparsePlan.full(1, 1, 1, 1, device=query.device)
        reason = BACKENDS["cuda"].unsupported(query, key, value, plan)
        _dense_backends[traits] = "sdpa" if reason else "cuda"
    return _dense_backends[traits]


def out_shape(query: Tensor, value: Tensor) -> tuple[int, int, int, int]:
    """Return the shape of the output of a call."""
    batch, heads, length, _ = query.shape
    return batch, heads, length, value.shape[-1]


def check_out(out: Tensor, query: Tensor, value: Tensor) -> None:
    """Raise ValueError unless `out` can hold the output of a call."""
    expected = out_shape(query, value)
    if tuple(out.shape) != expected or out.dtype != query.dtype or out.device != query.device:
        raise ValueError(
            f"out must be {list(expected)} in {query.dtype} on {query.device}, "
            f"got {list(out.shape)} in {out.dtype} on {out.device}"
        )


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError unless the three tensors fit each other."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [B, H, S, D], got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, "
                f"query is {query.dtype} on {query.device}; convert it first"
            )
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0]:
        raise ValueError(
            "key and value must share batch, heads and length, and the batch of query; got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"query has head_dim {query.shape[3]} but key has {key.shape[3]}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads are not a multiple of {key.shape[1]} key heads"
        )


def check_plan(query: Tensor, key: Tensor, plan: SparsePlan) -> None:
    """Raise ValueError unless the plan was made for tensors of these shapes."""
    expected = (plan.batch, plan.heads, plan.query_length, plan.key_length)
    found = (*query.shape[:3], key.shape[2])
    if expected != found:
        raise ValueError(
            f"the plan is for [batch, heads, queries, keys] = {list(expected)}, got {list(found)}"
        )
    if plan.device != query.device:
        raise ValueError(f"the plan is on {plan.device}, query on {query.device}; move one")
