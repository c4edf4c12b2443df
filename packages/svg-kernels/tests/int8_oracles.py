"""Attention over keys in 8-bit integers, for the tests: what the kernel computes, in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svg_kernels import Int8Key
from svg_kernels.attention import reference
from svg_kernels.attention.operands import Operands
from svg_kernels.key_int8.rows import LARGEST
from svg_kernels.rotation import rotate, unrotate


def attend_in_int8(
    query: Tensor,
    key: Int8Key,
    value: Tensor,
    run_starts: Tensor,
    run_lengths: Tensor,
    *,
    query_order: Tensor | None = None,
    summary: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: float | None = None,
    **_: Any,
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
    extra: tuple[Tensor | None, ...] = (None, None, None)
    if summary is not None:
        rows, values, weights = (x.double() for x in summary)
        extra = (torch.cat((torch.zeros_like(rows), rows), dim=-1), values, weights)
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.zeros(query.shape[:3], dtype=torch.float64, device=query.device)
    scale = width**-0.5 if scale is None else scale
    runs = (run_starts, run_lengths, query_order)
    operands = Operands(queries, keys, value.double(), *runs, *extra, None, scale)
    reference.block_sparse_attention(operands, out, lse)
    return out, lse


def round_query(query: Tensor, channel_scale: Tensor) -> Tensor:
    """Return the queries that the integers of the kernel stand for, fp64."""
    scale = channel_scale[:, :, None]
    rotated = rotate(query.float() * scale)
    step = rotated.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / LARGEST
    return unrotate((rotated / step).round().double() * step) / scale
