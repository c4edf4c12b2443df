"""Sharing the keys of a call among the tiles of its heads, on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svg_attention.tiles import TILE_ROWS, match_heads

# Gains of a batch item that are sorted to find the smallest one that pays.
SORTED = 2**20
# Part of an equal share that every tile keeps, since gains are estimates: with nothing kept, some
# calls of the embedded model got worse by 4 dB at a density of 20 %, with half by at most 0.4.
KEPT = 0.5


def share_budget(
    gain: Tensor,
    sizes: Tensor,
    budget: Tensor,
    length: int,
    gather_heads: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Share keys among all tiles of a batch item, half of them equally, half where they gain most.

    The other half goes where the smallest gain is the same everywhere. Its limit is the gain per
    key at which the clusters above it hold as many keys as there are to share; in a large call it
    is found among every n-th tile. Then all shares are scaled alike, so that their sum over rows is
    the budget's.

    Args:
        gain: fp32 `[B, H, T, C]`, what reading a cluster saves per key; not finite counts as 0.
        sizes: int32 `[B, H_kv, C]`, keys of each cluster.
        budget: fp32 `[B or 1]`, keys of a row on average.
        length: rows of the tiles; the last tile may have fewer than the others.
        gather_heads: makes `[B, H, ...]` of these heads those of all that share, in order; None if
            these are all.

    Returns:
        fp32 `[B, H, T]`, keys of each tile, at most all.
    """
    batch, heads, tiles, clusters = gain.shape
    gain = torch.where(gain.isfinite(), gain, 0.0)
    keys = match_heads(sizes, heads).float()[:, :, None]
    gathered = (lambda x: x) if gather_heads is None else gather_heads
    all_keys = gathered(keys)
    heads = all_keys.shape[1]
    stride = min(max(heads * tiles * clusters // SORTED, 1), max(tiles, 1))
    sample = gathered(gain[:, :, stride // 2 :: stride])
    ranked, order = sample.flatten(1).sort(dim=-1, descending=True)
    running = all_keys.expand_as(sample).flatten(1).gather(-1, order).double().cumsum(dim=-1)
    wanted = budget.double().expand(batch)[:, None] * (heads * sample.shape[2])
    last = (running < wanted).sum(dim=-1, keepdim=True).clamp(max=ranked.shape[1] - 1)
    limit = ranked.gather(-1, last)[:, :, None, None]
    share = torch.where(gain >= limit, keys, 0.0).sum(dim=-1)
    first = torch.arange(tiles, device=gain.device) * TILE_ROWS
    rows = (length - first).clamp(min=0, max=TILE_ROWS).float()
    total = gathered((share * rows).sum(dim=2, keepdim=True)).sum(dim=1, keepdim=True)
    equal = budget.float().expand(batch)[:, None, None]
    share = share * (equal * heads * rows.sum() / total.clamp(min=1.0))
    return torch.minimum(KEPT * equal + (1 - KEPT) * share, keys.sum(dim=-1))
