"""Ranking key clusters by the error their centroid would make, rather than by their mass."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_attention.methods.clustering import Clusters
from svg_attention.methods.selection import tile_average
from svg_attention.plan import match_heads
from svg_attention.planner import device_prober
from svg_attention.rows import take_rows

# Logits held at once while probing every key.
PROBE_LOGITS = 2**24


def centroid_error(
    means: Tensor,
    keys: Tensor,
    values: Tensor,
    clusters: Clusters,
    value_means: Tensor,
    scale: float,
    length: int,
    probe_rows: int,
) -> Tensor:
    """Estimate each tile's squared error, per key, of replacing a cluster by its centroid.

    Args:
        means: `[B, H, T * probes, D]`, from `probe_means`.
        keys: `[B, H_kv, N, D]`.
        values: `[B, H_kv, N, D_v]`.
        clusters: clusters of the keys.
        value_means: `[B, H_kv, C, D_v]`.
        scale: factor of the logits.
        length: query rows that were probed.
        probe_rows: rows of a probe.

    Returns:
        fp32 `[B, H, T, C]`, 0 for an empty cluster; see `probe_error`.
    """
    planner = device_prober(means)
    if planner is not None:
        errors: Tensor = planner.probe_errors(
            means,
            keys,
            values,
            clusters.order,
            clusters.centroids,
            value_means,
            clusters.sizes,
            length=length,
            probe_rows=probe_rows,
            scale=scale,
        )
        return errors
    heads = means.shape[1]
    per_probe = probe_error(
        means,
        match_heads(take_rows(keys, clusters.order), heads),
        match_heads(take_rows(values, clusters.order), heads),
        match_heads(clusters.centroids, heads),
        match_heads(value_means, heads),
        match_heads(clusters.sizes, heads),
        scale,
    )
    return tile_average(per_probe, length, probe_rows)


def probe_error(
    means: Tensor,
    keys: Tensor,
    values: Tensor,
    centroids: Tensor,
    value_means: Tensor,
    sizes: Tensor,
    scale: float,
) -> Tensor:
    """Estimate the squared error of replacing each key cluster by its centroid, per key.

    `e_tc = 1 / n_c * sum_(j in c) | exp(q_t . k_c) v_c - exp(q_t . k_j) v_j |^2 / Z_t^2`, where
    `k_c` and `v_c` are the mean key and value of the cluster, `q_t` is the mean query of a probe
    and `Z_t = sum_j exp(q_t . k_j)` over all keys, with `scale` in the exponents. Values are taken
    relative to their mean over the head: a constant added to every value changes no error of a
    softmax.

    Every key is probed with every mean query in chunks of probes; the sums over a cluster are
    differences of an fp64 running sum, so they do not depend on the order of threads.

    Args:
        means: fp32 `[B, H, T, D]`, one for each probe.
        keys: `[B, H, N, D]`, sorted by cluster.
        values: `[B, H, N, D_v]`, sorted by cluster.
        centroids: `[B, H, C, D]`.
        value_means: `[B, H, C, D_v]`.
        sizes: integers `[B, H, C]`.
        scale: factor of the logits.

    Returns:
        fp32 `[B, H, T, C]`, 0 for an empty cluster.

    Source: SVG-EAR, arXiv:2603.08982 (value-aware relaxed error), here per probe of a query tile.
    """
    ends = sizes.long().cumsum(dim=-1)
    rows = torch.arange(keys.shape[2], device=keys.device).expand(*ends.shape[:2], -1).contiguous()
    owner = torch.searchsorted(ends, rows, right=True).clamp_(max=ends.shape[-1] - 1)
    values, value_means = values.float(), value_means.float()
    constant = values.mean(dim=2, keepdim=True)
    values, value_means = values - constant, value_means - constant
    own_mean = value_means.gather(2, owner[..., None].expand(-1, -1, -1, values.shape[-1]))
    agreement = (values * own_mean).sum(dim=-1)[:, :, None]
    energy = values.square().sum(dim=-1)[:, :, None]
    mean_energy = value_means.square().sum(dim=-1)[:, :, None]
    keys_t = keys.float().transpose(-1, -2)
    centroids_t = centroids.float().transpose(-1, -2)
    count = sizes.float()[:, :, None]
    per_tile = keys.shape[0] * keys.shape[1] * keys.shape[2]
    errors = []
    for part in means.split(max(PROBE_LOGITS // max(per_tile, 1), 1), dim=2):
        logits = torch.matmul(part, keys_t) * scale
        largest = logits.amax(dim=-1, keepdim=True)
        weights = (logits - largest).exp_()
        denominator = weights.sum(dim=-1, keepdim=True)
        # By convexity a mean key's logit cannot exceed the largest of its cluster.
        centre = (torch.matmul(part, centroids_t) * scale - largest).clamp_(max=0).exp_()
        cross = _cluster_sums(weights * agreement, ends)
        square = _cluster_sums(weights.square_() * energy, ends)
        total = count * centre.square() * mean_energy - 2.0 * centre * cross + square
        errors.append(total.clamp_(min=0) / (count.clamp(min=1) * denominator.square()))
    return torch.cat(errors, dim=2)


def _cluster_sums(x: Tensor, ends: Tensor) -> Tensor:
    """Sum `[B, H, T, N]` over the rows of each cluster, given one past its last row `[B, H, C]`."""
    running = torch.nn.functional.pad(x.double().cumsum(dim=-1), (1, 0))
    edges = torch.nn.functional.pad(ends, (1, 0))[:, :, None].expand(-1, -1, x.shape[2], -1)
    return running.gather(-1, edges).diff(dim=-1).float()
