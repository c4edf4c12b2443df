"""Probing in plain torch: any device, the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS = 128


def probe_means(query: Tensor, order: Tensor, probe_rows: int) -> Tensor:
    """Gather in fp32, then average."""
    length = order.shape[-1]
    tiles = (length + TILE_ROWS - 1) // TILE_ROWS
    index = order.long()[..., None].expand(*order.shape, query.shape[-1])
    rows = query.float().gather(2, index)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, tiles * TILE_ROWS - length))
    sums = rows.unflatten(2, (-1, probe_rows)).sum(dim=3)
    counts = probe_counts(length, probe_rows, query.device)
    return (sums / counts.clamp(min=1)[:, None]).to(query.dtype)


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
    group = means.shape[1] // centroids.shape[1]
    keys = centroids.float().repeat_interleave(group, dim=1)
    weight = sizes.float().log().repeat_interleave(group, dim=1)[:, :, None]
    logits = means.float() @ keys.transpose(-1, -2) * scale + weight
    mass = tile_average(torch.softmax(logits, dim=-1), length, probe_rows)
    if not per_key:
        return mass
    return mass / sizes.clamp(min=1).repeat_interleave(group, dim=1)[:, :, None]


def probe_counts(length: int, probe_rows: int, device: torch.device) -> Tensor:
    """Return the rows behind each probe, int64 `[T * probes]`."""
    tiles = (length + TILE_ROWS - 1) // TILE_ROWS
    first = torch.arange(0, tiles * TILE_ROWS, probe_rows, device=device)
    return (length - first).clamp(min=0, max=probe_rows)


def tile_average(x: Tensor, length: int, probe_rows: int) -> Tensor:
    """Average `[B, H, T * probes, C]` over the probes of a tile, weighed by their rows."""
    probes = TILE_ROWS // probe_rows
    counts = probe_counts(length, probe_rows, x.device).to(x.dtype).view(-1, probes)
    weights = counts / counts.sum(dim=-1, keepdim=True)
    return (x.unflatten(2, (-1, probes)) * weights[..., None]).sum(dim=3)


def probe_errors(
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
) -> Tensor:
    """Score every key with every probe, head by head, in fp32."""
    batch, heads, probes, _ = means.shape
    group = heads // key.shape[1]
    errors = means.new_empty(batch, heads, probes, centroids.shape[2], dtype=torch.float32)
    for b in range(batch):
        for h in range(heads):
            k = h // group
            index, size = order[b, k].long(), sizes[b, k].long()
            owner = torch.arange(len(size), device=key.device).repeat_interleave(
                size, output_size=len(index)
            )
            weights, centre = _relative_weights(
                means[b, h].float() * scale, key[b, k, index].float(), centroids[b, k].float()
            )
            v, v_mean = value[b, k, index].float(), value_means[b, k].float()
            constant = v.mean(dim=0)
            v, v_mean = v - constant, v_mean - constant
            zero = torch.zeros_like(centre)
            cross = zero.index_add(1, owner, weights * (v * v_mean[owner]).sum(-1))
            square = zero.index_add(1, owner, weights.square() * v.square().sum(-1))
            total = size * centre.square() * v_mean.square().sum(-1) - 2 * centre * cross + square
            errors[b, h] = total.clamp(min=0) / size.clamp(min=1)
    return tile_average(errors, length, probe_rows)


def _relative_weights(q: Tensor, keys: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax weights of keys, and what centroids would weigh among them."""
    logits = q @ keys.T
    denominator = torch.logsumexp(logits, dim=-1, keepdim=True)
    return torch.exp(logits - denominator), torch.exp(q @ centroids.T - denominator)


def pattern_errors(rows: Tensor, key: Tensor, value: Tensor, reads: Tensor, scale: float) -> Tensor:
    """Attend three times under a mask, head by head, in fp32."""
    batch, heads = rows.shape[:2]
    group = heads // key.shape[1]
    errors = rows.new_empty(2, batch, heads, dtype=torch.float32)
    for b in range(batch):
        for h in range(heads):
            logits = rows[b, h].float() @ key[b, h // group].float().T * scale
            outs = [
                torch.softmax(logits.masked_fill((reads[b] & bit) == 0, -torch.inf), dim=-1)
                @ value[b, h // group].float()
                for bit in (1, 2, 4)
            ]
            for i in range(2):
                errors[i, b, h] = (outs[i + 1] - outs[0]).square().mean()
    return errors
