"""Choosing which key clusters a query tile reads.

Everything here is vectorised over batch, heads and tiles, has static shapes and never waits for
the device. `C` is the number of key clusters, `T` that of query tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svg_attention.layout import TokenLayout
from svg_attention.plan import TILE_ROWS, count_tiles, match_heads
from svg_attention.planner import device_planner, device_prober
from svg_attention.rows import take_rows

# Logits held at once while probes estimate their masses.
MASS_LOGITS = 2**26


def probe_means(query: Tensor, order: Tensor, probe_rows: int) -> Tensor:
    """Average queries in the given order, `probe_rows` at a time.

    Args:
        query: `[B, H, S, D]`.
        order: int32 `[B, H, N]`, rows of `query`.
        probe_rows: rows of a probe; divides a tile.

    Returns:
        `[B, H, T * probes, D]`, tile by tile over the tiles that hold one of the `N` rows; fp32,
        or typed as `query` where kernels plan. The last probe with rows is averaged over its own;
        those after it are zero.
    """
    planner = device_prober(query)
    if planner is not None:
        means: Tensor = planner.probe_means(query, order, probe_rows=probe_rows)
        return means
    length = order.shape[-1]
    rows = take_rows(query, order).float()
    rows = torch.nn.functional.pad(rows, (0, 0, 0, count_tiles(length) * TILE_ROWS - length))
    sums = rows.unflatten(2, (-1, probe_rows)).sum(dim=3)
    return sums / probe_counts(length, probe_rows, query.device).clamp(min=1)[:, None]


def probe_counts(length: int, probe_rows: int, device: torch.device) -> Tensor:
    """Return the rows behind each probe of `probe_means`, int64 `[T * probes]`."""
    probes = count_tiles(length) * (TILE_ROWS // probe_rows)
    first = torch.arange(probes, device=device) * probe_rows
    return (length - first).clamp(min=0, max=probe_rows)


def tile_average(x: Tensor, length: int, probe_rows: int) -> Tensor:
    """Average what the probes of each tile say, weighed by their rows.

    Args:
        x: `[B, H, T * probes, C]`.
        length: rows that were probed.
        probe_rows: rows of a probe.

    Returns:
        `[B, H, T, C]`.
    """
    if probe_rows == TILE_ROWS:
        return x
    counts = probe_counts(length, probe_rows, x.device).to(x.dtype)
    return _weigh_probes(x, counts.view(-1, TILE_ROWS // probe_rows))


def _weigh_probes(x: Tensor, counts: Tensor) -> Tensor:
    weights = counts / counts.sum(dim=-1, keepdim=True)
    return torch.einsum("bhtpc,tp->bhtc", x.unflatten(2, (-1, counts.shape[1])), weights)


def estimated_mass(
    means: Tensor,
    centroids: Tensor,
    sizes: Tensor,
    scale: float,
    length: int,
    probe_rows: int,
    *,
    per_key: bool = False,
) -> Tensor:
    """Estimate the share of a tile's attention that goes to each cluster.

    A probe with mean query `q` gives cluster `j` the share
    `n_j exp(q . k_j scale) / sum_i n_i exp(q . k_i scale)`; a tile averages its probes. A tile
    holds queries that look at different places: the mean of their shares keeps every place, the
    share of their mean keeps none.

    Args:
        means: `[B, H, T * probes, D]`, from `probe_means`.
        centroids: `[B, H_kv, C, D]`.
        sizes: integers `[B, H_kv, C]`.
        scale: factor of the logits.
        length: rows that were probed.
        probe_rows: rows of a probe.
        per_key: divide each cluster's mass by its keys: what reading one of them is worth.

    Returns:
        fp32 `[B, H, T, C]`, 0 for an empty cluster.
    """
    planner = device_prober(means)
    if planner is not None:
        estimated: Tensor = planner.probe_mass(
            means,
            centroids.to(means.dtype),
            sizes.int(),
            length=length,
            probe_rows=probe_rows,
            scale=scale,
            per_key=per_key,
        )
        return estimated
    heads, probes = means.shape[1], TILE_ROWS // probe_rows
    weight = match_heads(sizes.float().log(), heads)[:, :, None]
    centroids_t = match_heads(centroids, heads).float().transpose(-1, -2)
    counts = probe_counts(length, probe_rows, means.device).float()
    per_tile = means.shape[0] * heads * sizes.shape[-1] * probes
    step = max(MASS_LOGITS // max(per_tile, 1), 1) * probes
    parts = []
    for part, rows in zip(means.float().split(step, dim=2), counts.split(step), strict=True):
        shares = torch.softmax(torch.matmul(part, centroids_t) * scale + weight, dim=-1)
        parts.append(_weigh_probes(shares, rows.view(-1, probes)))
    mass = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return mass_per_key(mass, match_heads(sizes, heads)) if per_key else mass


def mass_per_key(mass: Tensor, sizes: Tensor) -> Tensor:
    """Divide each cluster's mass by its keys: what reading one of them is worth."""
    return mass / sizes.clamp(min=1)[:, :, None]


def rank(priority: Tensor, sizes: Tensor) -> Tensor:
    """Return clusters by falling priority, `[B, H, T, C]`; empty ones last, ties by number."""
    filled = (sizes > 0)[:, :, None]
    return priority.masked_fill(~filled, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def keep_top_p(mass: Tensor, sizes: Tensor, *, top_p: float, min_keep: float = 0.0) -> Tensor:
    """Keep, for each tile, the fewest leading clusters whose mass reaches `top_p`.

    Clusters are ranked by mass per key (equal ones by number), which reaches a share of the mass
    with fewer keys than ranking by mass. The cluster that crosses `top_p` is kept, and so are the
    first `int(min_keep * C)` ranks. Empty clusters come last and are never kept.

    Args:
        mass: fp32 `[B, H, T, C]`, sums to 1 over `C`.
        sizes: integers `[B, H, C]`.
        top_p: share of the mass to reach; 1 keeps every cluster.
        min_keep: fraction of the clusters that is kept whatever their mass.

    Returns:
        bool `[B, H, T, C]`.
    """
    filled = (sizes > 0)[:, :, None].expand_as(mass)
    if top_p >= 1.0:
        return filled
    priority = mass_per_key(mass, sizes)
    floor = int(min_keep * mass.shape[-1])
    planner = device_planner(mass)
    if planner is not None:
        chosen: Tensor = planner.keep_top_p(
            priority, mass, sizes.int(), top_p=top_p, min_clusters=floor
        )
        return chosen
    order = rank(priority, sizes)
    ranked = mass.gather(-1, order)
    kept = ranked.cumsum(dim=-1) - ranked < top_p
    kept[..., :floor] = True
    kept[..., :1] = True
    return torch.zeros_like(kept).scatter_(-1, order, kept) & filled


def keep_budget(priority: Tensor, sizes: Tensor, budget: Tensor) -> Tensor:
    """Keep, for each tile, clusters of falling priority until their keys fill a budget.

    Clusters are taken in order while the next one fits; then, twice, the ones after it that still
    fit are taken the same way. The keys kept never exceed the budget, except that the first
    cluster is always kept, so that no query is left without keys.

    Args:
        priority: fp32 `[B, H, T, C]`; equal ones rank by number.
        sizes: integers `[B, H, C]`; empty clusters are never kept.
        budget: keys, broadcastable with `[B, H, T]`.

    Returns:
        bool `[B, H, T, C]`.
    """
    planner = device_planner(priority)
    if planner is not None:
        room = budget.float().expand(priority.shape[:3])
        chosen: Tensor = planner.keep_budget(priority, sizes.int(), room)
        return chosen
    filled = (sizes > 0)[:, :, None]
    order = (
        priority.masked_fill(~filled, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    )
    keys = sizes.float()[:, :, None].expand_as(priority).gather(-1, order)
    left = budget.to(keys.dtype).expand(priority.shape[:3])[..., None]
    # The leading clusters, up to the first that does not fit; the first of all in any case.
    kept = keys.cumsum(dim=-1) <= left
    kept[..., 0] = True
    for _ in range(2):
        spare = left - (keys * kept).sum(dim=-1, keepdim=True)
        fits = ~kept & (keys <= spare)
        kept = kept | (fits & ((keys * fits).cumsum(dim=-1) <= spare))
    return torch.zeros_like(kept).scatter_(-1, order, kept) & filled


def key_budget(
    layout: TokenLayout, text_lengths: Tensor | None, density: float, like: Tensor
) -> Tensor:
    """Return how many video keys a video tile may read for a plan of this density.

    Text rows read everything, and so does a tile that holds one; every row reads the text. What is
    left of `density * tokens ** 2` pairs is shared equally by the other video rows.

    Args:
        layout: where the tokens are.
        text_lengths: integers `[B]`, valid text tokens; None for all.
        density: fraction of all valid pairs.
        like: a tensor on the device.

    Returns:
        fp64 `[B]`, or `[1]` for all text, between 0 and the video tokens.
    """
    most = float(layout.video_tokens)
    if text_lengths is None:
        keys = min(max(_keys_left(layout, layout.text_tokens, density), 0.0), most)
        return torch.full((1,), keys, dtype=torch.float64, device=like.device)
    text = text_lengths.to(like.device, torch.float64).clamp(0, layout.text_tokens)
    return _keys_left(layout, text, density).clamp(min=0.0, max=most)


def _keys_left(layout: TokenLayout, text: Any, density: float) -> Any:
    """Share the pairs that text does not take; `text` is a number or fp64 `[B]`."""
    video = layout.video_tokens
    tokens = video + text
    # These video rows are in one tile with text.
    shared = (text > 0) * (video % TILE_ROWS)
    free = video - shared
    pairs = density * tokens**2 - (text + shared) * tokens
    return pairs / (free + (free == 0)) - text
