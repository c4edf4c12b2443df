"""Layer norms to fp8 rows by the kernel of all norms in Triton."""

from __future__ import annotations

from torch import Tensor

from svg_kernels.norm.triton import launch_norm
from svg_kernels.quantize import LARGEST_E4M3, empty_rows


def layer_norm_modulate_fp8(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch `norm_rows_kernel`; see `reference.layer_norm_modulate_fp8`."""
    q, row_scale = empty_rows(x)
    launch_norm(
        x, q, z_scale=row_scale, weight=weight, bias=bias, scale=scale, shift=shift, eps=eps,
        largest=LARGEST_E4M3,
    )  # fmt: skip
    return q, row_scale


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
    """Launch `norm_rows_kernel`; see `reference.gate_residual_norm_fp8`."""
    y, (q, row_scale) = residual.new_empty(residual.shape), empty_rows(residual)
    launch_norm(
        residual, q, added=x, gate=gate, y=y, z_scale=row_scale, weight=weight, bias=bias,
        scale=scale, shift=shift, eps=eps, largest=LARGEST_E4M3,
    )  # fmt: skip
    return y, q, row_scale
