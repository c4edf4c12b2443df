"""Modulated LayerNorm and the gated residual in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels._arithmetic import match, round_to, widen
from svg_kernels.norm.reference import normalize


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Compute layer norm, then `* (1 + scale) + shift`."""
    y = normalize(widen(x), weight, bias, eps)
    return round_to(y * (1 + _per_token(scale, y)) + _per_token(shift, y), out_dtype)


def gate_residual(residual: Tensor, x: Tensor, gate: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Add `x * gate` to `residual`."""
    base = widen(residual)
    return round_to(base + match(x, base) * _per_token(gate, base), out_dtype)


def _per_token(x: Tensor, other: Tensor) -> Tensor:
    return match(x[:, None] if x.ndim == 2 else x, other)
