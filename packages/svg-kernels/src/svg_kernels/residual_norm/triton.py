"""A gated residual and its layer norm by the kernel of all norms in Triton."""

from __future__ import annotations

from torch import Tensor

from svg_kernels.norm.triton import launch_norm


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
    """Launch `norm_rows_kernel`; see `reference.gate_residual_norm`."""
    y, z = (residual.new_empty(residual.shape) for _ in range(2))
    launch_norm(
        residual, z, added=x, gate=gate, y=y, weight=weight, bias=bias, scale=scale, shift=shift,
        eps=eps,
    )  # fmt: skip
    return y, z
