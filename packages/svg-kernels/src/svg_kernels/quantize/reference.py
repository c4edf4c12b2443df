"""Rows in fp8 in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svg_kernels.quantize import SMALLEST


def quantize_rows(x: Tensor, activation: str, largest: float) -> tuple[Tensor, Tensor]:
    """Apply an activation in fp32, then scale rows up to `largest` and round them to e4m3."""
    y = x.float()
    if activation != "none":
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    sizes = y.abs().nan_to_num(nan=0.0, posinf=torch.inf)
    size = F.pad(sizes, (0, 1)).amax(dim=-1, keepdim=True)  # also of rows without values
    size = size.clamp(min=SMALLEST)
    q = (y * (largest / size)).to(torch.float8_e4m3fn)
    return q.contiguous(), size / largest
