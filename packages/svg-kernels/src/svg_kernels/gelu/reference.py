"""GELU in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from svg_kernels._arithmetic import widen


def gelu(x: Tensor, out: Tensor, approximate: str) -> None:
    """Write GELU of `x`, computed in fp32, to `out`."""
    out.copy_(F.gelu(widen(x), approximate=approximate))
