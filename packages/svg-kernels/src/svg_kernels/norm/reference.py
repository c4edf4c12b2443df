"""RMSNorm and LayerNorm in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels._arithmetic import match, round_to, widen


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Scale rows to unit root mean square, then by `weight`."""
    y = widen(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return round_to(y if weight is None else y * match(weight, y), out_dtype)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """Shift rows to mean 0 and scale them to variance 1, then apply `weight` and `bias`."""
    return round_to(normalize(widen(x), weight, bias, eps), out_dtype)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return layer norm in the dtype of `x`."""
    centred = x - x.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)  # what rounding left of a large mean
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * match(weight, y)
    return y if bias is None else y + match(bias, y)
