"""probe_sums in plain torch: any device, head by head, the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels.probe_sums.limits import TILE_ROWS

# Scores held at once.
GROUP_SCORES = 2**24


def probe_sums(
    probes: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    centroids: Tensor,
    value_means: Tensor,
    sizes: Tensor,
    length: int,
    probe_rows: int,
    scale: float,
    largest_bias: float,
    error: Tensor,
    bias: Tensor,
    output: Tensor,
    lse: Tensor,
) -> None:
    """Fill `error` and `bias`, and unless they are empty `output` and `lse`; in fp64."""
    batch, heads = probes.shape[:2]
    per_tile = TILE_ROWS // probe_rows
    tiles = max(GROUP_SCORES // (key.shape[2] * per_tile), 1)
    first = torch.arange(probes.shape[2], device=probes.device) * probe_rows
    rows = (length - first).clamp(min=0, max=probe_rows).double()
    for b in range(batch):
        for h in range(heads):
            k = h // (heads // key.shape[1])
            keys, values = (x[b, k][order[b, k].long()].double() for x in (key, value))
            size = sizes[b, k].long()
            owner = torch.arange(len(size), device=size.device).repeat_interleave(
                size, output_size=len(keys)
            )
            means, value_mean = centroids[b, k].double(), value_means[b, k].double()
            for group in range(0, error.shape[2], tiles):
                part = slice(group * per_tile, (group + tiles) * per_tile)
                found = _probe(
                    probes[b, h, part].double() * scale, keys, values, owner, means, value_mean,
                    size, largest_bias,
                )  # fmt: skip
                share = rows[part].view(-1, per_tile)
                share = (share / share.sum(-1, keepdim=True).clamp(min=1))[..., None]
                errors, masses, gaps, outputs, denominators = found
                errors, masses, gaps = (
                    x.unflatten(0, (-1, per_tile)) for x in (errors, masses, gaps)
                )
                where = slice(group, group + tiles)
                error[b, h, where] = (errors * share).sum(1).to(error.dtype)
                mass = (masses * share).sum(1)
                weighed = (masses * share * gaps).sum(1) / mass.clamp(min=1e-300)
                bias[b, h, where] = torch.where(mass > 0, weighed, 0.0).to(bias.dtype)
                if lse.numel():
                    output[b, h, part] = outputs.to(output.dtype)
                    lse[b, h, part] = denominators.to(lse.dtype)


def _probe(
    probes: Tensor,
    keys: Tensor,
    values: Tensor,
    owner: Tensor,
    centroids: Tensor,
    value_means: Tensor,
    size: Tensor,
    largest_bias: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return error, mass and bias of each probe and segment, and each probe's output and lse."""
    scores = probes @ keys.T
    denominator = torch.logsumexp(scores, dim=-1, keepdim=True)
    weights = torch.exp(scores - denominator)
    center_scores = probes @ centroids.T
    # A segment without keys has a mean of no meaning.
    center = torch.exp(center_scores - denominator).masked_fill(size == 0, 0.0)
    constant = values.mean(dim=0)
    shifted, shifted_means = values - constant, value_means - constant
    zero = torch.zeros_like(center)
    mass = zero.index_add(1, owner, weights)
    cross = zero.index_add(1, owner, weights * (shifted * shifted_means[owner]).sum(-1))
    square = zero.index_add(1, owner, weights.square() * shifted.square().sum(-1))
    error = size * center.square() * shifted_means.square().sum(-1) - 2 * center * cross + square
    # The logarithm of each segment's sum, relative to its own largest score.
    indices = owner.expand(len(probes), -1)
    largest = torch.full_like(center, -torch.inf).scatter_reduce(1, indices, scores, "amax")
    total = zero.index_add(1, owner, torch.exp(scores - largest[:, owner]))
    gap = total.log() + largest - size.clamp(min=1).log() - center_scores
    gap = torch.where(size > 0, gap, 0.0).clamp(min=0, max=largest_bias)
    error = error.clamp(min=0) / size.clamp(min=1)
    return error, mass, gap, weights @ values, denominator[:, 0]
