"""The error of scores alone where clusters of keys are replaced by their means, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_attention.planning.clustering import Clusters
from svg_attention.planning.reference import ERROR_LOGITS, cluster_sums, tile_average
from svg_attention.rows import take_rows
from svg_attention.tiles import match_heads


def score_error(
    means: Tensor, key: Tensor, clusters: Clusters, *, length: int, probe_rows: int, scale: float
) -> Tensor:
    """Return the squared error, per key, of the weights that each cluster's centroid stands for.

    Of cluster `c`, with `n` keys `k_j` of mean `k_c`, a probe with mean query `q` finds
    `1 / n * sum_(j in c) (exp(q . k_c scale) - exp(q . k_j scale))^2 / Z^2` with
    `Z = sum_j exp(q . k_j scale)`; a tile averages its probes, weighed by their rows.

    Args:
        means: `[B, H, P, D]`, from `probe_means`.
        key: `[B, H_kv, N, D]`.
        clusters: of `key`.
        length: rows that were probed.
        probe_rows: rows of a probe.
        scale: factor of the logits.

    Returns:
        fp32 `[B, H, T, C]`, 0 for an empty cluster.

    Source: SVG-EAR, arXiv:2603.08982, the error it routes by.
    """
    heads = means.shape[1]
    keys = match_heads(take_rows(key, clusters.order), heads).float().transpose(-1, -2)
    centroids = match_heads(clusters.centroids, heads).float().transpose(-1, -2)
    sizes = match_heads(clusters.sizes, heads)
    ends, count = sizes.long().cumsum(dim=-1), sizes.float()[:, :, None]
    per_probe = keys.shape[0] * heads * keys.shape[3]
    errors = []
    for part in means.float().split(max(ERROR_LOGITS // max(per_probe, 1), 1), dim=2):
        logits = torch.matmul(part, keys) * scale
        largest = logits.amax(dim=-1, keepdim=True)
        weights = (logits - largest).exp_()
        whole = weights.sum(dim=-1, keepdim=True)
        # By convexity a mean key's logit cannot exceed the largest of its cluster.
        centre = (torch.matmul(part, centroids) * scale - largest).clamp(max=0).exp_()
        cross = cluster_sums(weights, ends)
        square = cluster_sums(weights.square_(), ends)
        error = count * centre.square() - 2.0 * centre * cross + square
        errors.append(error.clamp_(min=0) / (count.clamp(min=1) * whole.square()))
    return tile_average(torch.cat(errors, dim=2), length, probe_rows)
