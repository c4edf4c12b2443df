"""Layer norms that write fp8 rows with a scale each, as matrix products with scaled rows take them.

Each is a norm of this package and `quantize_rows`, without the tensor between them.
"""

from __future__ import annotations

from torch import Tensor

from svg_kernels._checks import check_modulation, check_rows, check_tokens, check_vector
from svg_kernels._dispatch import define_op, select_backend
from svg_kernels.quantize import empty_rows, unsupported
from svg_kernels.residual_norm import check_sum

__all__ = ["gate_residual_norm_fp8", "layer_norm_modulate_fp8"]


def layer_norm_modulate_fp8(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalize and modulate each row of `x`, then round it to e4m3, its largest value to 448.

    `quantize_rows(layer_norm_modulate(x, scale, shift, ...))`, which rounds to the dtype of `x` in
    between, in one pass.

    Args:
        x: `[B, S, C]`, fp16, bf16 or fp32, any strides.
        scale: `[B, C]` or `[B, 1, C]` (one per batch element) or `[B, S, C]` (one per token).
        shift: the same shapes; it need not have the shape of `scale`.
        weight: `[C]` or None for ones.
        bias: `[C]` or None for zeros.
        eps: added to the variance, in the unit of `x^2`.
        backend: `"auto"`, `"triton"` or `"reference"`; there is no compiled one.

    Returns:
        e4m3 `[B, S, C]` and the fp32 scale `[B, S, 1]` of each row, contiguous. For inference: no
        gradient flows through them.

    Raises:
        TypeError: if a dtype is none of the three.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: Peebles & Xie 2022, arXiv:2212.09748, section 3.2 (adaLN); the format is Micikevicius et
    al. 2022, arXiv:2209.05433, section 3.
    """
    check_rows("x", x)
    check_tokens(x)
    check_vector("weight", weight, x)
    check_vector("bias", bias, x)
    check_modulation("scale", scale, x)
    check_modulation("shift", shift, x)
    q, row_scale = _layer_norm_modulate_fp8(x, scale, shift, weight, bias, eps, backend)
    return q, row_scale


def gate_residual_norm_fp8(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Add `x`, scaled by a gate, to the residual stream, and normalize the sum to rows of e4m3.

    `y, z = gate_residual_norm(residual, x, gate, ...)` and `quantize_rows(z)`, which rounds to the
    dtype of `residual` in between, in one pass.

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
        backend: `"auto"`, `"triton"` or `"reference"`; there is no compiled one.

    Returns:
        `y`, typed as `residual`, then e4m3 `[B, S, C]` and the fp32 scale `[B, S, 1]` of each row,
        all contiguous. For inference: no gradient flows through them.

    Raises:
        TypeError: if a dtype is none of the three.
        ValueError: if a shape does not fit, the devices differ, or only one of `scale` and `shift`
            is given.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: as `layer_norm_modulate_fp8`.
    """
    check_sum(residual, x, gate, scale, shift, weight, bias)
    y, q, row_scale = _gate_residual_norm_fp8(
        residual, x, gate, scale, shift, weight, bias, eps, backend
    )
    return y, q, row_scale


def _run_layer_norm_modulate_fp8(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = select_backend(__name__, backend, x.device, unsupported=unsupported)
    q, row_scale = module.layer_norm_modulate_fp8(x, scale, shift, weight, bias, eps)
    return q, row_scale


def _run_gate_residual_norm_fp8(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = select_backend(__name__, backend, residual.device, unsupported=unsupported)
    y, q, row_scale = module.gate_residual_norm_fp8(
        residual, x, gate, scale, shift, weight, bias, eps
    )
    return y, q, row_scale


def _fake_layer_norm_modulate_fp8(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_rows(x)


def _fake_gate_residual_norm_fp8(residual: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return residual.new_empty(residual.shape), *empty_rows(residual)


_layer_norm_modulate_fp8 = define_op(
    "layer_norm_modulate_fp8",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? weight, Tensor? bias, float eps, str backend)"
    " -> (Tensor, Tensor)",
    _run_layer_norm_modulate_fp8,
    _fake_layer_norm_modulate_fp8,
)
_gate_residual_norm_fp8 = define_op(
    "gate_residual_norm_fp8",
    "(Tensor residual, Tensor x, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight,"
    " Tensor? bias, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    _run_gate_residual_norm_fp8,
    _fake_gate_residual_norm_fp8,
)
