"""Norm, rotation and layout of queries and keys in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svg_kernels._arithmetic import match, widen
from svg_kernels.rope.reference import rotate_pairs
from svg_kernels.rope.tables import pair_views


def qk_norm_rope(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    half: bool,
    start: int,
) -> None:
    """Normalize `[B, S, H*D]`, rotate, and write to `outs` of shape `[B, H, S, D]`."""
    for x, weight, out in zip(xs, weights, outs, strict=True):
        heads, dim = out.shape[1], out.shape[3]
        y = widen(x)
        if weight.numel() == dim:
            y = y.unflatten(-1, (heads, dim))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * match(weight, y)
        y = y.reshape(x.shape[0], x.shape[1], heads, dim).transpose(1, 2)
        if cos is not None:
            c, s = pair_views(cos, sin, dim, half)
            stop = start + c.shape[1]
            turned = rotate_pairs(y[:, :, start:stop], c, s, half)
            y = torch.cat((y[:, :, :start], turned, y[:, :, stop:]), dim=2)
        out.copy_(y)
