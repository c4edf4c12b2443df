"""Planning in plain torch: any device, the oracle of the kernels, and what plans on a CPU.

Vectorised over batch, heads and tiles, with bounded memory; nothing waits for the device. Each
function computes what the file that is named after it states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svg_attention.planning.dispatch import LARGEST_BIAS
from svg_attention.planning.segments import merge_segments
from svg_attention.rows import take_rows
from svg_attention.tiles import TILE_ROWS, count_tiles, match_heads

# Runs may have any length here, and tiles be computed in any order.
RUN_MULTIPLE = 1
ORDERS_TILES = False
# Logits held at once: of probes with centroids, of probes with keys, of sampled rows with keys.
MASS_LOGITS = 2**26
ERROR_LOGITS = 2**24
PATTERN_LOGITS = 2**26
# Mass of a cluster, relative to the heaviest key, below which its bias is not measured.
SMALL_MASS = 1e-10


def probe_means(query: Tensor, order: Tensor, probe_rows: int) -> Tensor:
    """Gather in fp32, then average."""
    length = order.shape[-1]
    rows = take_rows(query, order).float()
    rows = torch.nn.functional.pad(rows, (0, 0, 0, count_tiles(length) * TILE_ROWS - length))
    sums = rows.unflatten(2, (-1, probe_rows)).sum(dim=3)
    return sums / probe_counts(length, probe_rows, query.device).clamp(min=1)[:, None]


def probe_mass(
    means: Tensor,
    centroids: Tensor,
    sizes: Tensor,
    length: int,
    probe_rows: int,
    scale: float,
    per_key: bool,
) -> Tensor:
    """Take the softmax of every probe over all clusters, then average by tile."""
    heads, probes = means.shape[1], TILE_ROWS // probe_rows
    weight = match_heads(sizes.float().log(), heads)[:, :, None]
    centroids_t = match_heads(centroids, heads).float().transpose(-1, -2)
    counts = probe_counts(length, probe_rows, means.device).float()
    per_tile = means.shape[0] * heads * sizes.shape[-1] * probes
    chunk = max(MASS_LOGITS // max(per_tile, 1), 1) * probes
    parts = []
    for part, rows in zip(means.float().split(chunk, dim=2), counts.split(chunk), strict=True):
        shares = torch.softmax(torch.matmul(part, centroids_t) * scale + weight, dim=-1)
        parts.append(_weigh_probes(shares, rows.view(-1, probes)))
    mass = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return mass / match_heads(sizes, heads).clamp(min=1)[:, :, None] if per_key else mass


def probe_counts(length: int, probe_rows: int, device: torch.device) -> Tensor:
    """Return the rows behind each probe, int64 `[T * probes]`."""
    probes = count_tiles(length) * (TILE_ROWS // probe_rows)
    first = torch.arange(probes, device=device) * probe_rows
    return (length - first).clamp(min=0, max=probe_rows)


def tile_average(x: Tensor, length: int, probe_rows: int) -> Tensor:
    """Average `[B, H, T * probes, C]` over the probes of each tile, weighed by their rows."""
    if probe_rows == TILE_ROWS:
        return x
    counts = probe_counts(length, probe_rows, x.device).to(x.dtype)
    return _weigh_probes(x, counts.view(-1, TILE_ROWS // probe_rows))


def _weigh_probes(x: Tensor, counts: Tensor) -> Tensor:
    weights = counts / counts.sum(dim=-1, keepdim=True)
    return torch.einsum("bhtpc,tp->bhtc", x.unflatten(2, (-1, counts.shape[1])), weights)


def keep_top_p(
    priority: Tensor, mass: Tensor, sizes: Tensor, top_p: float, min_clusters: int
) -> Tensor:
    """Sort by priority and keep a prefix."""
    order = _rank(priority, sizes)
    ranked = mass.gather(-1, order)
    kept = ranked.cumsum(dim=-1) - ranked < top_p
    kept[..., :min_clusters] = True
    return _scatter(kept, order, priority, sizes)


def keep_budget(priority: Tensor, sizes: Tensor, budget: Tensor) -> Tensor:
    """Sort by priority, keep the prefix that fits, then fill up twice."""
    order = _rank(priority, sizes)
    keys = sizes.float()[:, :, None].expand_as(priority).gather(-1, order)
    left = budget.to(keys.dtype)[..., None]
    # The leading clusters, up to the first that does not fit; the first of all in any case.
    kept = keys.cumsum(dim=-1) <= left
    kept[..., :1] = True
    for _ in range(2):
        spare = left - (keys * kept).sum(dim=-1, keepdim=True)
        fits = ~kept & (keys <= spare)
        kept = kept | (fits & ((keys * fits).cumsum(dim=-1) <= spare))
    return _scatter(kept, order, priority, sizes)


def _rank(priority: Tensor, sizes: Tensor) -> Tensor:
    """Return clusters in descending priority, empty ones last, equal ones by number."""
    empty = (sizes == 0)[:, :, None]
    return priority.masked_fill(empty, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def _scatter(kept: Tensor, order: Tensor, priority: Tensor, sizes: Tensor) -> Tensor:
    """Return which clusters are kept: all those with keys where a priority is not finite."""
    found = torch.zeros_like(kept).scatter_(-1, order, kept)
    unknown = ~priority.isfinite().all(dim=-1, keepdim=True)
    return (found | unknown) & (sizes > 0)[:, :, None]


def probe_sums(
    means: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    centroids: Tensor,
    value_means: Tensor,
    sizes: Tensor,
    length: int,
    probe_rows: int,
    scale: float,
    return_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probe every key in chunks of probes, then average by tile.

    The sums over a cluster are differences of an fp64 running sum, so they do not depend on the
    order of threads.
    """
    heads = means.shape[1]
    keys, values = (match_heads(take_rows(x, order), heads).float() for x in (key, value))
    centroids, value_means, sizes = (
        match_heads(x, heads) for x in (centroids, value_means.float(), sizes)
    )
    ends = sizes.long().cumsum(dim=-1)
    rows = torch.arange(keys.shape[2], device=keys.device).expand(*ends.shape[:2], -1).contiguous()
    owner = torch.searchsorted(ends, rows, right=True).clamp_(max=ends.shape[-1] - 1)
    constant = values.mean(dim=2, keepdim=True)
    values, value_means = values - constant, value_means - constant
    own_mean = value_means.gather(2, owner[..., None].expand(-1, -1, -1, values.shape[-1]))
    agreement = (values * own_mean).sum(dim=-1)[:, :, None]
    energy = values.square().sum(dim=-1)[:, :, None]
    mean_energy = value_means.square().sum(dim=-1)[:, :, None]
    keys_t = keys.transpose(-1, -2)
    centroids_t = centroids.float().transpose(-1, -2)
    count = sizes.float()[:, :, None]
    per_probe = keys.shape[0] * keys.shape[1] * keys.shape[2]
    errors, masses, biases, outputs, denominators = [], [], [], [], []
    for part in means.float().split(max(ERROR_LOGITS // max(per_probe, 1), 1), dim=2):
        logits = torch.matmul(part, keys_t) * scale
        largest = logits.amax(dim=-1, keepdim=True)
        weights = (logits - largest).exp_()
        denominator = weights.sum(dim=-1, keepdim=True)
        center_logits = torch.matmul(part, centroids_t) * scale - largest
        # By convexity a mean key's logit cannot exceed the largest of its cluster.
        centre = center_logits.clamp(max=0).exp_()
        total = cluster_sums(weights, ends)
        gap = total.clamp(min=SMALL_MASS).log() - count.clamp(min=1).log() - center_logits
        # What hardly counts is not measured: its sum is a difference of large numbers.
        counts = (total > SMALL_MASS) & (count > 0)
        biases.append(torch.where(counts, gap, 0.0).clamp(min=0, max=LARGEST_BIAS))
        masses.append(total / denominator)
        if return_output:
            outputs.append(torch.matmul(weights, values) / denominator + constant)
            denominators.append((denominator.log() + largest).squeeze(-1))
        cross = cluster_sums(weights * agreement, ends)
        square = cluster_sums(weights.square_() * energy, ends)
        error = count * centre.square() * mean_energy - 2.0 * centre * cross + square
        errors.append(error.clamp_(min=0) / (count.clamp(min=1) * denominator.square()))
    mass = torch.cat(masses, dim=2)
    lacking = tile_average(mass * torch.cat(biases, dim=2), length, probe_rows)
    mass = tile_average(mass, length, probe_rows)
    bias = torch.where(mass > 0, lacking / mass.clamp(min=1e-37), 0.0)
    output, lse = (
        torch.cat(x, dim=2) if x else means.new_empty(0, dtype=torch.float32)
        for x in (outputs, denominators)
    )
    return tile_average(torch.cat(errors, dim=2), length, probe_rows), bias, output, lse


def cluster_sums(x: Tensor, ends: Tensor) -> Tensor:
    """Sum `[B, H, T, N]` over the rows of each cluster, given one past its last row `[B, H, C]`."""
    running = torch.nn.functional.pad(x.double().cumsum(dim=-1), (1, 0))
    edges = torch.nn.functional.pad(ends, (1, 0))[:, :, None].expand(-1, -1, x.shape[2], -1)
    return running.gather(-1, edges).diff(dim=-1).float()


def pattern_error(rows: Tensor, key: Tensor, value: Tensor, reads: Tensor, scale: float) -> Tensor:
    """Attend three times under a mask, some rows at a time, in fp32."""
    batch, heads, count, _ = rows.shape
    keys = match_heads(key, heads).float().transpose(-1, -2)
    values = match_heads(value, heads).float()
    totals = rows.new_zeros(2, batch, heads, dtype=torch.float32)
    chunk = max(PATTERN_LOGITS // (batch * heads * key.shape[2]), 1)
    for part, bits in zip(rows.split(chunk, dim=2), reads.split(chunk, dim=1), strict=True):
        logits = torch.matmul(part.float() * scale, keys)
        exact, *outs = (
            torch.softmax(logits.masked_fill((bits & bit)[:, None] == 0, -torch.inf), dim=-1)
            @ values
            for bit in (1, 2, 4)
        )
        for total, out in zip(totals, outs, strict=True):
            total += (out - exact).square().sum(dim=(-1, -2))
    return totals / (count * value.shape[-1])


def merge_clusters(
    mask: Tensor, ends: Tensor, full: Tensor | None, multiple: int
) -> tuple[Tensor, Tensor]:
    """Merge the clusters as segments; the last segment is read by every tile."""
    if full is not None:
        mask = mask | full[:, None, :, None]
    kept = torch.nn.functional.pad(mask, (0, 1), value=True)
    starts = torch.nn.functional.pad(ends[..., :-1], (1, 0))
    slots = (mask.shape[-1] + 2) // 2
    found = merge_segments(
        starts[:, :, None], ends[:, :, None], kept, slots=slots, multiple=multiple
    )
    return _grow(*found, multiple, ends[:, :, None, -1:])


def round_runs(
    run_starts: Tensor, run_lengths: Tensor, multiple: int, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge what lies close together, then lengthen."""
    ends, slots = run_starts + run_lengths, run_starts.shape[-1]
    found = merge_segments(run_starts, ends, run_lengths > 0, slots=slots, multiple=multiple)
    return _grow(*found, multiple, limit[:, None, None, None])


def _grow(starts: Tensor, lengths: Tensor, multiple: int, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Lengthen runs that have room to a multiple of rows, up to `limit`."""
    if multiple == 1:
        return starts, lengths
    grown = (lengths + multiple - 1) // multiple * multiple
    grown = torch.minimum(starts + grown, limit.to(grown.dtype)) - starts
    return starts, torch.where(lengths > 0, torch.maximum(grown, lengths), 0)


def long_tiles_first(rows: Tensor, ratio: float) -> Tensor:
    """Sort by whether a tile is short; the sort is stable."""
    rows = rows.float()
    sequences, tiles = rows.shape
    short = rows <= ratio * rows.mean(dim=-1, keepdim=True)
    order = short.to(torch.uint8).argsort(dim=-1, stable=True)
    return (order + torch.arange(sequences, device=rows.device)[:, None] * tiles).view(-1).int()


def deal_heads(cost: Tensor, by_cost: Tensor, ranks: int) -> Tensor:
    """Give each head in turn to the process that has least, of those with room."""
    heads = len(cost)
    rank = torch.arange(ranks, device=cost.device)
    room = heads // ranks + (rank < heads % ranks).long()
    first = room.cumsum(0) - room
    filled, load = torch.zeros_like(room), torch.zeros(ranks, device=cost.device)
    places = []
    for head in by_cost:
        least = torch.where(filled < room, load, torch.inf).argmin()
        taken = rank == least
        places.append((taken * (first + filled)).sum())
        load = load + taken * cost.gather(0, head[None])
        filled = filled + taken
    if not places:
        return by_cost
    return torch.empty_like(by_cost).scatter_(0, torch.stack(places), by_cost)
