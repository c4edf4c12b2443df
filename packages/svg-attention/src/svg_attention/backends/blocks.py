"""What the backends that wrap other libraries share."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_attention.plan import SparsePlan
from svg_attention.rows import put_rows, take_rows
from svg_attention.tiles import match_heads


def not_on_cuda(x: Tensor, least: tuple[int, int]) -> str | None:
    """Return why a tensor is on no GPU of at least this compute capability, or None if it is."""
    if x.device.type != "cuda":
        return f"needs tensors on a CUDA device, these are on {x.device.type!r}"
    found = torch.cuda.get_device_capability(x.device)
    if found < least:
        wanted = ".".join(map(str, least))
        return f"needs compute capability {wanted} or newer, this GPU has {found[0]}.{found[1]}"
    return None


def not_half_precision(query: Tensor, value: Tensor, head_dims: tuple[int, ...]) -> str | None:
    """Return why a kernel for 16 bits and these head sizes takes no such tensors, or None."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"query must be fp16 or bf16, got {query.dtype}"
    if query.shape[-1] not in head_dims or value.shape[-1] != query.shape[-1]:
        return (
            f"head_dim must be one of {head_dims} for keys and values alike, "
            f"got {query.shape[-1]} and {value.shape[-1]}"
        )
    return None


def in_plan_order(
    query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows in the plan's order, keys and values with a head for each of the plan's."""
    heads = plan.heads
    key, value = match_heads(key, heads), match_heads(value, heads)
    if plan.query_order is not None:
        query = take_rows(query, plan.query_order)
    if plan.key_order is not None:
        order = match_heads(plan.key_order, heads)
        key, value = take_rows(key, order), take_rows(value, order)
    return query, key, value


def token_ordered(x: Tensor, plan: SparsePlan, out: Tensor | None = None) -> Tensor:
    """Move rows `[B, H, Sq, ...]` from plan order to token order, into `out` if it is given."""
    if plan.query_order is not None:
        return put_rows(x, plan.query_order, out)
    return x if out is None else out.copy_(x)


def clear_empty_rows(x: Tensor, plan: SparsePlan, fill: float = 0.0) -> Tensor:
    """Write `fill` into the rows of tiles that read nothing.

    Args:
        x: `[B, H, Sq]` or `[B, H, Sq, D]`, in plan order.
        plan: which keys each tile reads.
        fill: what such rows hold.
    """
    empty = (plan.run_lengths == 0).all(dim=-1).repeat_interleave(plan.tile_rows, dim=2)
    empty = empty[:, :, : plan.query_length]
    return x.masked_fill(empty if x.dim() == 3 else empty[..., None], fill)
