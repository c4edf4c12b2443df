"""What adaptive layer norm adds to a transformer block: modulation and gated residuals."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels._checks import (
    check_companion,
    check_modulation,
    check_rows,
    check_tokens,
    check_vector,
)
from svg_kernels._dispatch import define_op, launchers, select_backend

__all__ = ["gate_residual", "layer_norm_modulate"]


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalize each row of `x`, then scale and shift it by what the time step says.

    `y = layer_norm(x, weight, bias) * (1 + scale) + shift`, in one pass, rounded once.

    Args:
        x: `[B, S, C]`, fp16, bf16 or fp32, any strides.
        scale: `[B, C]` or `[B, 1, C]` (one per batch element) or `[B, S, C]` (one per token).
        shift: the same shapes; it need not have the shape of `scale`.
        weight: `[C]` or None for ones.
        bias: `[C]` or None for zeros.
        eps: added to the variance, in the unit of `x^2`.
        out_dtype: dtype of the result; that of `x` by default.
        backend: `"auto"`, `"cuda"`, `"triton"` or `"reference"`.

    Returns:
        Contiguous `[B, S, C]`. For inference: no gradient flows through it.

    Raises:
        TypeError: if a dtype is none of the three.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: Peebles & Xie 2022, arXiv:2212.09748, section 3.2 (adaLN).
    """
    y: Tensor
    compiled = launchers(backend, x)
    if compiled is not None:
        y = torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format)
        if compiled.norm(x, weight, bias, scale, shift, y, eps, True):
            return y
    check_rows("x", x, out_dtype)
    check_tokens(x)
    check_vector("weight", weight, x)
    check_vector("bias", bias, x)
    check_modulation("scale", scale, x)
    check_modulation("shift", shift, x)
    y = _layer_norm_modulate(x, scale, shift, weight, bias, eps, out_dtype, backend)
    return y


def gate_residual(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add `x`, scaled by a gate, to the residual stream.

    `y = residual + x * gate`, in fp32, rounded once.

    Args:
        residual: `[B, S, C]`, fp16, bf16 or fp32, any strides.
        x: `[B, S, C]`; its dtype may differ from that of `residual`.
        gate: `[B, C]` or `[B, 1, C]` (one per batch element) or `[B, S, C]` (one per token).
        out_dtype: dtype of the result; that of `residual` by default.
        backend: `"auto"`, `"cuda"`, `"triton"` or `"reference"`.

    Returns:
        Contiguous `[B, S, C]`. For inference: no gradient flows through it.

    Raises:
        TypeError: if a dtype is none of the three.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: Peebles & Xie 2022, arXiv:2212.09748, section 3.2 (adaLN-Zero).
    """
    y: Tensor
    compiled = launchers(backend, residual)
    if compiled is not None:
        y = torch.empty_like(residual, dtype=out_dtype, memory_format=torch.contiguous_format)
        if compiled.gate_residual(residual, x, gate, y):
            return y
    check_rows("residual", residual, out_dtype)
    check_rows("x", x)
    check_tokens(residual, "residual")
    if x.shape != residual.shape:
        raise ValueError(f"x must be {list(residual.shape)} like residual, got {list(x.shape)}")
    check_companion("x", x, residual, "residual")
    check_modulation("gate", gate, residual, "residual")
    y = _gate_residual(residual, x, gate, out_dtype, backend)
    return y


def _run_layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    module = select_backend(__name__, backend, x.device)
    y: Tensor = module.layer_norm_modulate(x, scale, shift, weight, bias, eps, out_dtype or x.dtype)
    return y


def _fake_layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype)


def _run_gate_residual(
    residual: Tensor, x: Tensor, gate: Tensor, out_dtype: torch.dtype | None, backend: str
) -> Tensor:
    module = select_backend(__name__, backend, x.device)
    y: Tensor = module.gate_residual(residual, x, gate, out_dtype or residual.dtype)
    return y


def _fake_gate_residual(
    residual: Tensor, x: Tensor, gate: Tensor, out_dtype: torch.dtype | None, backend: str
) -> Tensor:
    return residual.new_empty(residual.shape, dtype=out_dtype or residual.dtype)


_layer_norm_modulate = define_op(
    "layer_norm_modulate",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? weight, Tensor? bias, float eps,"
    " ScalarType? out_dtype, str backend) -> Tensor",
    _run_layer_norm_modulate,
    _fake_layer_norm_modulate,
)
_gate_residual = define_op(
    "gate_residual",
    "(Tensor residual, Tensor x, Tensor gate, ScalarType? out_dtype, str backend) -> Tensor",
    _run_gate_residual,
    _fake_gate_residual,
)
