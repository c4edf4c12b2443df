"""Modulated LayerNorm and the gated residual by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels import _library
from svg_kernels._rows import contiguous_rows
from svg_kernels.norm.cuda import launch_norm


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch `norm` with centring and modulation; see `reference.layer_norm_modulate`."""
    return launch_norm(x, weight, bias, scale, shift, eps, out_dtype, True)


def gate_residual(residual: Tensor, x: Tensor, gate: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Launch `gate_residual`; see `reference.gate_residual`."""
    y = torch.empty(residual.shape, dtype=out_dtype, device=residual.device)
    tensors = (contiguous_rows(t) for t in (residual, x, gate))
    _library.require_launch(_library.functions(x.device).gate_residual(*tensors, y))
    return y
