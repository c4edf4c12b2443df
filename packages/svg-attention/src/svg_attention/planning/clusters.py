"""The one entry of cluster methods: from clustered queries and keys to what each tile reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flash_kmeans import update
from svg_attention.planning import cuda
from svg_attention.planning.clustering import Clusters
from svg_attention.planning.dispatch import LARGEST_BIAS, planner_for, select_planner
from svg_attention.planning.order import LONG_RATIO
from svg_attention.planning.runs import cluster_ends
from svg_attention.planning.scores import score_error
from svg_attention.planning.shares import share_budget
from svg_attention.tiles import count_tiles, match_heads


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """State how tiles select among key clusters.

    Attributes:
        budget: fp32 `[B or 1]`, keys that a tile may read; None to choose by `top_p`.
        shared: let the budget be what tiles of a batch item read on average, spent where errors
            are largest. Needs `by_error`.
        gather_heads: for a shared budget, makes values of the call's heads those of the layer's, if
            others are elsewhere; see `share_budget`.
        top_p: share of the estimated attention that a tile reads.
        min_clusters: clusters that a tile reads at least, where it chooses by `top_p`.
        by_error: read the clusters that their centroid would replace worst.
        by_scores: the same by the error of their scores alone, without values.
        correct_bias: raise the weight of centroids to what the probes find their clusters weigh.
        probe_rows: rows of a probe; divides 128.
        return_probes: also return the probes and their exact outputs. Needs `by_error`.
        return_read: also return what is read as the bytes of a `Choice`.
    """

    budget: Tensor | None = None
    shared: bool = False
    gather_heads: Callable[[Tensor], Tensor] | None = None
    top_p: float = 1.0
    min_clusters: int = 1
    by_error: bool = False
    by_scores: bool = False
    correct_bias: bool = False
    probe_rows: int = 16
    return_probes: bool = False
    return_read: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """Hold what the tiles of a call read, in a byte a cluster, for another call to read the same.

    Attributes:
        query_order: int32 `[B, H, N]`, video rows as the tiles hold them.
        key_clusters: of the video keys.
        read: uint8 `[B, H, T, C]`, 255 where a tile reads a cluster, else its bias in 254ths of the
            largest.
    """

    query_order: Tensor
    key_clusters: Clusters
    read: Tensor

    def fits(self, query: Tensor, key: Tensor) -> bool:
        """Return whether video queries and keys `[B, H, N, D]` are like those it was made for."""
        found = (*self.query_order.shape[:2], self.key_clusters.labels.shape[1:])
        same = found == (*query.shape[:2], key.shape[1:3])
        return same and self.read.device == query.device


# Bytes of a `Choice`: a cluster that is read, and the largest bias.
READ, MOST = 255, 254


@dataclass(frozen=True, kw_only=True, eq=False)
class TileReads:
    """Hold what each tile of queries reads; see `SparsePlan` for the terms.

    Attributes:
        run_starts: int32 `[B, H, T, R]`.
        run_lengths: int32 `[B, H, T, R]`.
        run_multiple: rows that every run is a multiple of, but for one that ends the valid keys.
        tile_order: int32 `[B, H, T]`, or None.
        value_means: `[B, H_kv, C, D_v]`, mean value of each cluster; None without compensation.
        log_weights: fp32 `[B, H, T, C]`, logarithm of how many keys each centroid stands for, and
            what it lacks; None without compensation.
        broken: bool `[B, H]`, heads that read everything because a query or key is not finite.
        read: uint8 `[B, H, T, C]`, see `Choice`, video tiles only; None unless asked for.
        probes: `[B, H, P, D]`, the probes of the video tiles, and fp32 `[B, H, P, D_v]` and
            `[B, H, P]`, output and log-sum-exp of their attention to every video key; None unless
            asked for.
    """

    run_starts: Tensor
    run_lengths: Tensor
    run_multiple: int
    tile_order: Tensor | None
    value_means: Tensor | None
    log_weights: Tensor | None
    broken: Tensor
    read: Tensor | None = None
    probes: tuple[Tensor, Tensor, Tensor] | None = None


def plan_clusters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_clusters: Clusters,
    key_clusters: Clusters,
    selection: Selection,
    *,
    tokens: int,
    text: Tensor | int,
    full_tiles: Tensor | None,
    scale: float,
    compensate: bool,
) -> TileReads:
    """Estimate, select and merge: everything between the clusters of a call and its plan.

    Who computes it (kernels or plain torch) is decided here, once. A head whose queries or keys
    are not all finite reads every key.

    Args:
        query: `[B, H, N, D]`, video rows.
        key: `[B, H_kv, N, D]`, video rows.
        value: `[B, H_kv, N, D_v]`, video rows.
        query_clusters: of `query`.
        key_clusters: of `key`.
        selection: how tiles choose.
        tokens: video and text tokens, padding included.
        text: valid text tokens, which follow the video and which every tile reads: a number, or
            integers `[B]`.
        full_tiles: bool `[B or 1, 1, T]`, tiles that read everything; None for none.
        scale: factor of the logits.
        compensate: also return what stands in for unread clusters.
    """
    planner = select_planner(planner_for(query), query.device)
    heads = query.shape[1]
    means = planner.probe_means(query, query_clusters.order, selection.probe_rows)
    sizes = match_heads(key_clusters.sizes, heads)
    value_means = mean_values(value, key_clusters) if compensate else None
    length = query_clusters.order.shape[-1]
    mask, bias, exact = select_clusters(
        planner, means, key, value, key_clusters, value_means, selection, scale, length
    )
    broken = query_clusters.broken | match_heads(key_clusters.broken, heads)
    reads = merge_reads(
        planner, mask, bias, sizes, broken, value_means, tokens=tokens, text=text,
        full_tiles=full_tiles,
    )  # fmt: skip
    return replace(
        reads,
        read=_encode(mask, bias) if selection.return_read else None,
        probes=None if exact is None else (means.to(query.dtype), *exact),
    )


def read_alike(
    choice: Choice,
    key_clusters: Clusters,
    value: Tensor,
    broken: Tensor,
    *,
    tokens: int,
    text: Tensor | int,
    full_tiles: Tensor | None,
    compensate: bool,
) -> TileReads:
    """Return what the tiles of another call read as a choice says.

    Args:
        choice: of the call that chose.
        key_clusters: those of the choice, with the centroids of this call's keys.
        value: `[B, H_kv, N, D_v]`, video rows of this call.
        broken: bool `[B, H]`, heads that read everything.
        tokens: as in `plan_clusters`.
        text: as in `plan_clusters`.
        full_tiles: as in `plan_clusters`.
        compensate: as in `plan_clusters`.
    """
    planner = select_planner(planner_for(value), value.device)
    value_means = mean_values(value, key_clusters) if compensate else None
    mask = choice.read == READ
    bias = torch.where(mask, 0.0, choice.read.float() * (LARGEST_BIAS / MOST))
    sizes = match_heads(key_clusters.sizes, mask.shape[1])
    return merge_reads(
        planner, mask, bias, sizes, broken, value_means, tokens=tokens, text=text,
        full_tiles=full_tiles,
    )  # fmt: skip


def merge_reads(
    planner: Any,
    mask: Tensor,
    bias: Tensor | None,
    sizes: Tensor,
    broken: Tensor,
    value_means: Tensor | None,
    *,
    tokens: int,
    text: Tensor | int,
    full_tiles: Tensor | None,
    weights: Tensor | None = None,
) -> TileReads:
    """Merge the clusters that video tiles read into runs, and weigh the others.

    Args:
        planner: who computes.
        mask: bool `[B, H, T, C]`, clusters that each video tile reads.
        bias: fp32 `[B, H, T, C]`, what logarithms of weights lack; None for nothing.
        sizes: int32 `[B, H, C]`.
        broken: bool `[B, H]`, heads that read everything.
        value_means: of the clusters; None without compensation.
        tokens: as in `plan_clusters`.
        text: as in `plan_clusters`.
        full_tiles: as in `plan_clusters`.
        weights: int32 `[B, H, C]`, keys that each centroid stands for, where `sizes` are those of a
            part of the keys alone; None for `sizes`.
    """
    # Tiles past the video read nothing but text, unless they hold text rows themselves.
    spare = count_tiles(tokens) - mask.shape[2]
    if spare:
        mask = torch.nn.functional.pad(mask, (0, 0, 0, spare))
        bias = None if bias is None else torch.nn.functional.pad(bias, (0, 0, 0, spare))
    # What a broken head would be judged by is not to be trusted, so it stays dense.
    mask = mask | broken[..., None, None]
    whole = None if full_tiles is None else full_tiles[:, 0].expand(mask.shape[0], -1)
    multiple = planner.RUN_MULTIPLE if value_means is None else 1
    starts, lengths = planner.merge_clusters(mask, cluster_ends(sizes, text), whole, multiple)
    order = None
    if planner.ORDERS_TILES:
        rows = lengths.sum(dim=-1, dtype=torch.int32).flatten(0, 1)
        order = planner.long_tiles_first(rows, LONG_RATIO).view(mask.shape[:3])
    log_weights = None
    if value_means is not None:
        everything = mask if full_tiles is None else mask | full_tiles[..., None]
        found = (sizes if weights is None else weights).float().log()[:, :, None].expand(mask.shape)
        log_weights = (found if bias is None else found + bias).masked_fill(everything, -torch.inf)
    return TileReads(
        run_starts=starts,
        run_lengths=lengths,
        run_multiple=multiple,
        tile_order=order,
        value_means=value_means,
        log_weights=log_weights,
        broken=broken,
    )


def _encode(mask: Tensor, bias: Tensor | None) -> Tensor:
    """Return what tiles read and what unread centroids lack as the bytes of a `Choice`."""
    code = 0.0 if bias is None else bias.clamp(0, LARGEST_BIAS) * (MOST / LARGEST_BIAS)
    return torch.where(mask, float(READ), code).round().to(torch.uint8)


def select_clusters(
    planner: Any,
    means: Tensor,
    key: Tensor,
    value: Tensor,
    clusters: Clusters,
    value_means: Tensor | None,
    selection: Selection,
    scale: float,
    length: int,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Return the clusters that each tile reads, what unread centroids lack, and exact probes.

    The first two are `[B, H, T, C]`, bool and fp32; the third is output and log-sum-exp of every
    probe. What is not asked for is None.
    """
    kept: Tensor
    error = bias = exact = None
    rows = selection.probe_rows
    sizes = match_heads(clusters.sizes, means.shape[1])
    probed = (length, rows, scale)
    budget = selection.budget
    if selection.by_scores:
        error = score_error(means, key, clusters, length=length, probe_rows=rows, scale=scale)
    elif selection.by_error:
        tensors = (means, key, value, clusters.order, clusters.centroids, value_means)
        prober = cuda if cuda.unsupported(means, key, value, rows) is None else planner
        wanted = selection.return_probes
        error, bias, *found = prober.probe_sums(*tensors, clusters.sizes, *probed, wanted)
        bias, exact = bias if selection.correct_bias else None, tuple(found) if wanted else None
    if error is not None and budget is not None:
        if selection.shared:
            room = share_budget(error, sizes, budget, length, selection.gather_heads)
        else:
            room = budget[:, None, None].expand(error.shape[:3])
        return planner.keep_budget(error, sizes, room), bias, exact
    mass = planner.probe_mass(
        means, clusters.centroids, clusters.sizes, *probed, budget is not None
    )
    if budget is not None:
        room = budget[:, None, None].expand(mass.shape[:3])
        return planner.keep_budget(mass, sizes, room), None, None
    priority = mass / sizes.clamp(min=1)[:, :, None]
    floor = max(selection.min_clusters, 1)
    kept = planner.keep_top_p(priority, mass, sizes, selection.top_p, floor)
    if error is not None:
        room = (kept * sizes[:, :, None]).sum(dim=-1).float()
        kept = planner.keep_budget(error, sizes, room)
    return kept, bias, exact


def mean_values(value: Tensor, clusters: Clusters) -> Tensor:
    """Return the mean value of each key cluster, `[B, H, C, D_v]`; 0 for an empty one."""
    batch, heads, rows, width = value.shape
    count = clusters.sizes.shape[-1]
    means = update(
        value.reshape(batch * heads, rows, width),
        clusters.labels.reshape(batch * heads, rows),
        count,
        previous=value.new_zeros(batch * heads, count, width),
    ).centroids
    return means.view(batch, heads, count, width)


def mean_slope(key: Tensor, value: Tensor, clusters: Clusters) -> Tensor:
    """Return how the mean value of a cluster changes with the query, to first order.

    `1 / N * sum_j (k_j - k_c)' (v_j - v_c)`, the covariance of keys and values within clusters,
    averaged over the keys of a head.

    Args:
        key: `[B, H_kv, N, D]`.
        value: `[B, H_kv, N, D_v]`.
        clusters: of `key`.

    Returns:
        fp32 `[B, H_kv, D, D_v]`.

    Source: PISA and PASA (arXiv:2604.12219), which share one slope among blocks, too.
    """
    keys, values = (
        x - means.gather(2, clusters.labels.long()[..., None].expand_as(x))
        for x, means in ((key, clusters.centroids), (value, mean_values(value, clusters)))
    )
    return (keys.transpose(-1, -2) @ values).float() / max(key.shape[2], 1)
