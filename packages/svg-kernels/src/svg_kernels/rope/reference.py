"""Rotary embedding in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svg_kernels._arithmetic import match, widen
from svg_kernels.rope.tables import pair_views


def rope(
    xs: Sequence[Tensor],
    outs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor | None,
    half: bool,
    start: int,
) -> None:
    """Rotate the tokens from `start` on that the tables cover, from `[B, H, S, D]` to `outs`.

    An output may be its own input.
    """
    c, s = pair_views(cos, sin, xs[0].shape[3], half)
    for x, out in zip(xs, outs, strict=True):
        if out is not x:
            out.copy_(x)
        rows = out[:, :, start : start + c.shape[1]]
        rows.copy_(rotate_pairs(widen(rows), c, s, half))


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """Rotate the pairs of the last axis; `cos` and `sin` are `[1 or B, S, D/2]`."""
    c, s = match(cos, x)[:, None], match(sin, x)[:, None]
    a, b = x.chunk(2, dim=-1) if half else (x[..., 0::2], x[..., 1::2])
    first, second = a * c - b * s, b * c + a * s
    if half:
        return torch.cat((first, second), dim=-1)
    return torch.stack((first, second), dim=-1).flatten(-2)
