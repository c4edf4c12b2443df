"""Attention over keys in 8-bit integers, for the tests: what the kernel computes, in fp64."""

from __future__ import annotations

from typing import Any

import torch
from attention_oracles import brute_force
from torch import Tensor

from svg_kernels import Int8Key
from svg_kernels.key_int8.rows import LARGEST
from svg_kernels.rotation import rotate, unrotate


def attend_in_int8(
    query: Tensor,
    key: Int8Key,
    value: Tensor,
    run_starts: Tensor,
    run_lengths: Tensor,
    *,
    summary: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    """Compute output and log-sum-exp of rounded queries and keys; summaries are not rounded.

    A logit is that of the rounded query and what is left of a key without the mean, and that of the
    exact query and the mean: one product of rows twice as wide.
    """
    width = query.shape[-1]
    group = query.shape[1] // key.key.shape[1]
    mean = key.mean.double()[:, :, None]
    rounded = round_query(query, key.channel_scale.repeat_interleave(group, dim=1))
    queries = torch.cat((rounded, query.double()), dim=-1)
    keys = torch.cat((key.dequantized().double() - mean, mean.expand(key.key.shape)), dim=-1)
    if summary is not None:
        rows, values, weights = summary
        rows = torch.cat((torch.zeros_like(rows), rows), dim=-1)
        summary = (rows, _widened(values), weights)
    out, lse = brute_force(
        queries,
        keys,
        _widened(value),
        run_starts,
        run_lengths,
        summary=summary,
        scale=width**-0.5 if scale is None else scale,
        **keywords,
    )
    return out[..., :width], lse


def round_query(query: Tensor, channel_scale: Tensor) -> Tensor:
    """Return the queries that the integers of the kernel stand for, fp64."""
    scale = channel_scale[:, :, None]
    rotated = rotate(query.float() * scale)
    step = rotated.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / LARGEST
    return unrotate((rotated / step).round().double() * step) / scale


def _widened(value: Tensor) -> Tensor:
    return torch.cat((value, torch.zeros_like(value)), dim=-1)
