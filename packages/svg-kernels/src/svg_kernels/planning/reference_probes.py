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
    means: Tensor, centroids: Tensor, sizes: Tensor, length: int, probe_rows: int, scale: float
) -> Tensor:
    """Take the softmax of every probe over all clusters, then average by tile."""
    group = means.shape[1] // centroids.shape[1]
    keys = centroids.float().repeat_interleave(group, dim=1)
    weight = sizes.float().log().repeat_interleave(group, dim=1)[:, :, None]
    logits = means.float() @ keys.transpose(-1, -2) * scale + weight
    return tile_average(torch.softmax(logits, dim=-1), length, probe_rows)


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
