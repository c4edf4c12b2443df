"""Keys and values in e4m3: what is taken out of them first, and what puts it back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svg_kernels.rotation import unrotate

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""
SMALLEST = 1e-30
"""The least scale."""
FLATTEST = 2.0**-10
"""The least scale of a key's channel, relative to the mean of all: less is rounding alone."""


@dataclass(frozen=True, kw_only=True)
class Fp8KeyValue:
    """Keys and values in e4m3, and what turns them back.

    `key = unrotate(bytes) * key_scale + key_mean`, `value = bytes * value_scale + value_mean`.

    Attributes:
        key: e4m3 `[B, Hk, S, 128]`, rotated.
        value: e4m3 `[B, Hk, S, 128]`.
        key_scale: fp32 `[B, Hk, 128]`: `sqrt(s * mean(s))` of the deviations `s` of the channels.
            It shares what channels differ by between keys and queries, which are multiplied by it,
            and leaves rotated keys a mean square of one: an element may exceed that 448 times, and
            down to 1/64 of it keeps all its digits.
        key_mean: fp32 `[B, Hk, 128]`.
        value_scale: fp32 `[B, Hk, 128]`.
        value_mean: fp32 `[B, Hk, 128]`.
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor
    key_mean: Tensor
    value_scale: Tensor
    value_mean: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return all of them, in the order above."""
        return (
            self.key,
            self.value,
            self.key_scale,
            self.key_mean,
            self.value_scale,
            self.value_mean,
        )

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values that the bytes stand for, fp32."""
        key = unrotate(self.key.float()) * self.key_scale[..., None, :]
        value = self.value.float() * self.value_scale[..., None, :]
        return key + self.key_mean[..., None, :], value + self.value_mean[..., None, :]


def key_scales(deviation: Tensor) -> Tensor:
    """Return the scales of keys whose channels have the standard deviations `[..., 128]`."""
    mean = deviation.mean(dim=-1, keepdim=True)
    return torch.maximum((deviation * mean).sqrt(), mean * FLATTEST).clamp_min(SMALLEST)
