"""RMSNorm and LayerNorm by the compiled kernels, for arguments that need a conversion first."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels import _library
from svg_kernels._rows import contiguous_rows


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Launch `norm` without centring; see `reference.rms_norm`."""
    return launch_norm(x, weight, None, None, None, eps, out_dtype, False)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """Launch `norm` with centring; see `reference.layer_norm`."""
    return launch_norm(x, weight, bias, None, None, eps, out_dtype, True)


def launch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    center: bool,
) -> Tensor:
    """Launch `norm`, which reads rows that two strides describe; copy `x` where it takes more."""
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    rest = (
        *(t if t is None else contiguous_rows(t) for t in (weight, bias, scale, shift)),
        y,
        eps,
        center,
    )
    norm = _library.functions(x.device).norm
    if not norm(contiguous_rows(x), *rest):
        _library.require_launch(norm(x.contiguous(), *rest))
    return y
