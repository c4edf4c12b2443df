"""Density and recall of a plan, and the density that a recall needs."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_attention import config
from svg_attention.plan import SparsePlan
from svg_attention.tiles import match_heads

# Logits held at once, over all heads.
METRIC_LOGITS = 2**26


def density(plan: SparsePlan) -> Tensor:
    """Return the query-key pairs computed exactly, as a fraction of all valid pairs: `[B, H]`."""
    return plan.density()


def recall(
    query: Tensor,
    key: Tensor,
    plan: SparsePlan,
    *,
    rows: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the share of the true attention that falls on keys the plan reads.

    The mean over rows of `sum_(j read) softmax_j(q_i . k_j * scale)`, where the softmax is over
    all valid keys. Centroids do not count.

    Args:
        query: `[B, H, Sq, D]`.
        key: `[B, H_kv, Sk, D]`.
        plan: which keys each query reads.
        rows: int64 `[N]`, positions in plan order to average over, such as
            `torch.arange(0, S, 37)`; None for all. They must be valid queries.
        scale: factor of the logits, `D ** -0.5` when None.

    Returns:
        fp32 `[B, H]`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if rows is None:
        rows = torch.arange(plan.query_length, device=query.device)
    batch, heads = plan.batch, plan.heads
    total = torch.zeros(batch, heads, device=query.device)
    keys = _plan_ordered(match_heads(key, heads), plan.key_order)
    limit = _key_limit(plan)
    place = torch.arange(plan.key_length, device=query.device)
    for part in rows.split(max(METRIC_LOGITS // (batch * heads * plan.key_length), 1)):
        sampled = _take(query, part, plan.query_order)
        logits = torch.matmul(sampled.float() * scale, keys.float().transpose(-1, -2))
        logits = logits.masked_fill(place >= limit, -torch.inf)
        share = torch.softmax(logits, dim=-1).double().cumsum(dim=-1)
        share = torch.nn.functional.pad(share, (1, 0))
        tile = part // plan.tile_rows
        starts = plan.run_starts[:, :, tile].long()
        ends = starts + plan.run_lengths[:, :, tile]
        total += (share.gather(-1, ends) - share.gather(-1, starts)).sum(dim=(-1, -2)).float()
    return total / len(rows)


def needed_density(
    query: Tensor,
    key: Tensor,
    *,
    recall: float = 0.9,
    rows: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the density at which an oracle that chooses single keys reaches a given recall.

    The mean over rows of the smallest number of keys whose softmax weights sum to at least
    `recall`, divided by the number of keys.

    Args:
        query: `[B, H, Sq, D]`.
        key: `[B, H_kv, Sk, D]`.
        recall: share of the attention to keep.
        rows: int64 `[N]`, queries to average over; None for all.
        scale: factor of the logits, `D ** -0.5` when None.

    Returns:
        fp32 `[B, H]`.

    Raises:
        ValueError: if `recall` is not in (0, 1].
    """
    config.fraction("recall", recall)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, length, _ = query.shape
    if rows is None:
        rows = torch.arange(length, device=query.device)
    keys = match_heads(key, heads).float().transpose(-1, -2)
    total = torch.zeros(batch, heads, device=query.device)
    for part in rows.split(max(METRIC_LOGITS // (batch * heads * key.shape[2]), 1)):
        logits = torch.matmul(query.index_select(2, part).float() * scale, keys)
        weights = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True).values
        before = weights.cumsum(dim=-1) - weights
        total += (before < recall).sum(dim=(-1, -2)).float()
    return total / (len(rows) * key.shape[2])


def _plan_ordered(keys: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return keys
    order = match_heads(order, keys.shape[1]).long()[..., None]
    return keys.gather(2, order.expand_as(keys))


def _take(query: Tensor, rows: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return query.index_select(2, rows)
    index = order.index_select(2, rows).long()[..., None]
    return query.gather(2, index.expand(*index.shape[:3], query.shape[-1]))


def _key_limit(plan: SparsePlan) -> Tensor | int:
    return plan.key_length if plan.key_lengths is None else plan.key_lengths[:, None, None, None]
