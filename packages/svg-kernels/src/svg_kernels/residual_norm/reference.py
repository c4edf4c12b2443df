"""A gated residual and its layer norm in plain torch."""

from __future__ import annotations

from torch import Tensor

from svg_kernels._arithmetic import match, round_to, widen
from svg_kernels.modulation import reference
from svg_kernels.norm.reference import layer_norm


def gate_residual_norm(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Add, round, and normalize what was rounded."""
    if gate is None:
        base = widen(residual)
        y = round_to(base + match(x, base), residual.dtype)
    else:
        y = reference.gate_residual(residual, x, gate, residual.dtype)
    if scale is None or shift is None:
        return y, layer_norm(y, weight, bias, eps, y.dtype)
    return y, reference.layer_norm_modulate(y, scale, shift, weight, bias, eps, y.dtype)
