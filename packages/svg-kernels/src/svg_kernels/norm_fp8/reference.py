"""Layer norms to fp8 rows in plain torch: the norm, then the rounding."""

from __future__ import annotations

from torch import Tensor

from svg_kernels.modulation import reference as modulation
from svg_kernels.quantize import LARGEST_E4M3
from svg_kernels.quantize.reference import quantize_rows
from svg_kernels.residual_norm import reference as residual_norm


def layer_norm_modulate_fp8(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalize and modulate, round to the dtype of `x`, then to e4m3."""
    z = modulation.layer_norm_modulate(x, scale, shift, weight, bias, eps, x.dtype)
    return quantize_rows(z, "none", LARGEST_E4M3)


def gate_residual_norm_fp8(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add, round, normalize, round to the dtype of `residual`, then to e4m3."""
    y, z = residual_norm.gate_residual_norm(residual, x, gate, scale, shift, weight, bias, eps)
    return y, *quantize_rows(z, "none", LARGEST_E4M3)
