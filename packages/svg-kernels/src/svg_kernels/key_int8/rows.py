"""Keys in 8-bit integers: what is taken out of them first, and what puts it back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svg_kernels.rotation import unrotate

LARGEST = 127
"""The largest integer; the least is its negative."""
BALANCED = 2.0
"""Channels whose deviation is this many times the mean one, or more, are scaled down."""
SMALLEST = 1e-30
"""The least mean deviation and the least length of a row that is divided by."""


@dataclass(frozen=True, kw_only=True)
class Int8Key:
    """Keys in 8-bit integers, and what turns them back.

    `key = unrotate(integers * row_scale) * channel_scale + mean`.

    Attributes:
        key: int8 `[B, Hk, S, 128]`, rotated.
        row_scale: fp32 `[B, Hk, S]`: the largest element of a row becomes 127, so that a key has
            eight digits whatever the lengths of others.
        channel_scale: fp32 `[B, Hk, 128]`: 1, but `sqrt(s / (2 mean(s)))` where the deviation `s`
            of a channel is more than twice the mean one. It shares what an outlier is larger by
            between keys and queries, which are multiplied by it; in trained models the channels of
            queries are large where those of keys are, so others are left alone.
        mean: fp32 `[B, Hk, 128]`.
    """

    key: Tensor
    row_scale: Tensor
    channel_scale: Tensor
    mean: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return all of them, in the order above."""
        return self.key, self.row_scale, self.channel_scale, self.mean

    def dequantized(self) -> Tensor:
        """Return the keys that the integers stand for, fp32."""
        rows = unrotate(self.key.float() * self.row_scale[..., None])
        return rows * self.channel_scale[..., None, :] + self.mean[..., None, :]


def channel_scales(deviation: Tensor) -> Tensor:
    """Return the scales of channels with the standard deviations `[..., 128]`."""
    mean = deviation.mean(dim=-1, keepdim=True).clamp_min(SMALLEST)
    return (deviation / (BALANCED * mean)).clamp_min(1.0).sqrt()


def finite(x: Tensor) -> Tensor:
    """Return `x` with 0 for what is not a finite number."""
    return torch.where(x.isfinite(), x, 0.0)
