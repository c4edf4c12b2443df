"""A gated residual and the layer norm that follows it, in one pass over the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels import _dispatch
from svg_kernels._checks import (
    check_companion,
    check_modulation,
    check_rows,
    check_tokens,
    check_vector,
)
from svg_kernels._dispatch import define_op, select_backend

__all__ = ["gate_residual_norm"]


def gate_residual_norm(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add `x`, scaled by a gate, to the residual stream, and normalize the rows of the sum.

    `y = residual + x * gate` and `z = layer_norm(y, weight, bias) * (1 + scale) + shift`: what
    `gate_residual` and `layer_norm_modulate` return one after the other, with `y` read once less.
    `z` is made of `y` as it was rounded.

    Args:
        residual: `[B, S, C]`, fp16, bf16 or fp32, any strides.
        x: `[B, S, C]`; its dtype may differ from that of `residual`.
        gate: `[B, C]` or `[B, 1, C]` (one per batch element) or `[B, S, C]` (one per token); None
            for ones.
        scale: the same shapes; None for zeros, and then `shift` must be None, too.
        shift: the same shapes.
        weight: `[C]` or None for ones.
        bias: `[C]` or None for zeros.
        eps: added to the variance, in the unit of `y^2`.
        backend: `"auto"`, `"triton"` or `"reference"`; there is no compiled one, since Triton's
            moves as many bytes a second as a copy does.

    Returns:
        `y` and `z`, contiguous `[B, S, C]`, typed as `residual`. For inference: no gradient flows
        through them.

    Raises:
        TypeError: if a dtype is none of the three.
        ValueError: if a shape does not fit, the devices differ, or only one of `scale` and `shift`
            is given.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: Peebles & Xie 2022, arXiv:2212.09748, section 3.2 (adaLN-Zero).
    """
    check_sum(residual, x, gate, scale, shift, weight, bias)
    y, z = _gate_residual_norm(residual, x, gate, scale, shift, weight, bias, eps, backend)
    return y, z


def check_sum(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raise unless the arguments of `gate_residual_norm` fit each other."""
    check_rows("residual", residual)
    check_rows("x", x)
    check_tokens(residual, "residual")
    if x.shape != residual.shape:
        raise ValueError(f"x must be {list(residual.shape)} like residual, got {list(x.shape)}")
    check_companion("x", x, residual, "residual")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift go together; got one of them, pass both or neither")
    for name, value in (("gate", gate), ("scale", scale), ("shift", shift)):
        if value is not None:
            check_modulation(name, value, residual, "residual")
    check_vector("weight", weight, residual, "residual")
    check_vector("bias", bias, residual, "residual")


def unsupported(name: str, device: torch.device) -> str | None:
    """Return in a sentence why the backend `name` cannot run on `device`, None if it can."""
    if name == "cuda":
        return "the sum and its norm are computed by Triton, there is no compiled kernel"
    return _dispatch.unsupported(name, device)


def _run(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = select_backend(__name__, backend, residual.device, unsupported=unsupported)
    y, z = module.gate_residual_norm(residual, x, gate, scale, shift, weight, bias, eps)
    return y, z


def _fake(residual: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


_gate_residual_norm = define_op(
    "gate_residual_norm",
    "(Tensor residual, Tensor x, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight,"
    " Tensor? bias, float eps, str backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)
