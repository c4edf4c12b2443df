"""Keys and values in e4m3: what is taken out of them first, and what puts it back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

HEAD_DIM = 128
DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""
SMALLEST = 1e-30
"""The least scale."""
FLATTEST = 2.0**-10
"""The least scale of a key's channel, relative to the mean of all: less is rounding alone."""
SIGNS = 0x13198A2E03707344243F6A8885A308D3
"""The signs of the rotation, the lowest bit for channel 0; the compiled kernel has the same."""


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


@cache
def signed_hadamard(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the Hadamard matrix `[128, 128]` in Sylvester's order, columns signed.

    A fixed pattern of signs keeps channels that are alike from meeting in one.
    """
    matrix = torch.ones(1, 1)
    while len(matrix) < HEAD_DIM:
        matrix = torch.cat([torch.cat([matrix, matrix]), torch.cat([matrix, -matrix])], dim=1)
    signs = torch.tensor([1.0 - 2.0 * (SIGNS >> i & 1) for i in range(HEAD_DIM)])
    return (matrix * signs).to(device, dtype)


def rotate(x: Tensor) -> Tensor:
    """Rotate rows `[..., 128]`, spreading each channel over all of them.

    Dot products of two rotated rows are those of the rows. Ashkboos et al. 2024, arXiv:2404.00456.
    """
    return x @ signed_hadamard(x.device, x.dtype).T / math.sqrt(HEAD_DIM)


def unrotate(x: Tensor) -> Tensor:
    """Undo `rotate`."""
    return x @ signed_hadamard(x.device, x.dtype) / math.sqrt(HEAD_DIM)
