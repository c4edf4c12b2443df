"""Heads of a layer on several devices: what each of them costs, and who computes them next."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_attention.memory import LayerMemory
from svg_attention.methods import HeadShare
from svg_attention.planning.dealing import counts_of_heads, deal_heads


def by_head(cost: Tensor, share: HeadShare) -> Tensor:
    """Return a number of each head of a layer, by its number: `[H]`.

    Args:
        cost: `[h]`, of the heads here; every device has to ask for all.
        share: which these are.
    """
    dealt = share.gather(cost[None])[0]
    if share.order is None:
        return dealt
    return torch.empty_like(dealt).scatter_(0, share.order, dealt)


def imbalance(cost: Tensor, share: HeadShare) -> Tensor:
    """Return the most that a device has, over the mean of all: a scalar.

    Args:
        cost: `[H]`, of each head by its number.
        share: who computes which.
    """
    dealt = cost if share.order is None else cost[share.order]
    loads = [part.sum() for part in dealt.split(counts_of_heads(len(cost), share.devices))]
    most = torch.stack(loads).max()
    return torch.where(most > 0, most * share.devices / cost.sum(), 1.0)


def deal_again(cost: Tensor, share: HeadShare, memory: LayerMemory) -> Tensor:
    """Deal the heads of a layer out by what they cost, and send what is remembered along.

    Args:
        cost: `[H]`, of each head by its number.
        share: who has computed which.
        memory: of the heads that were here; afterwards of those that are here next.

    Returns:
        The order in which devices have the heads next, int64 `[H]`.
    """
    order = deal_heads(cost.float(), share.devices)
    here = share.here(order)
    places = here if share.order is None else share.order.argsort()[here]
    for name in ("query_centroids", "key_centroids"):
        kept = getattr(memory, name)
        if kept is not None:
            setattr(memory, name, share.gather(kept).index_select(1, places))
    return order
