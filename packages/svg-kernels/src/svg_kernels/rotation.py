"""The rotation of keys and queries in 8 bits, which spreads each channel over all of them."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

HEAD_DIM = 128
SIGNS = 0x13198A2E03707344243F6A8885A308D3
"""The signs of the rotation, the lowest bit for channel 0; the compiled kernels have the same."""


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
