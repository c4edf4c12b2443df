"""The arithmetic of the reference backend: in fp32, or fp64 for fp64 inputs, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Return `x` in fp32, or as it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()


def match(x: Tensor, other: Tensor) -> Tensor:
    """Return `x` in the dtype of `other`."""
    return x.to(other.dtype)


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` rounded to `dtype`, contiguous."""
    return x.to(dtype).contiguous()
