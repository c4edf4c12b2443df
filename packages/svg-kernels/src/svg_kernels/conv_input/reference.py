"""What a convolution reads, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svg_kernels._arithmetic import match, widen

_COLUMN = (-1, 1, 1, 1)


def conv_input(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
    y: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    upsample: list[int],
    padding: list[int],
) -> None:
    """Write to `y` what `svg_kernels.conv_input` describes, computed in fp32."""
    wide = widen(x)
    if offset is not None:
        wide = wide + match(offset, wide).view(_COLUMN)
    if groups and wide.numel():
        wide = _normalize(wide, weight, bias, groups, eps)
    if silu:
        wide = F.silu(wide)
    first, others = wide[:, :, :1], wide[:, :, 1:].repeat_interleave(upsample[0], 2)
    wide = torch.cat((first, others), 2)
    for axis in (1, 2):
        wide = wide.repeat_interleave(upsample[axis], 2 + axis)
    for axis in range(3):
        before, after = padding[4 - 2 * axis], padding[5 - 2 * axis]
        size = wide.shape[2 + axis]
        place = torch.arange(-before, size + after, device=x.device).clamp(0, size - 1)
        wide = wide.index_select(2 + axis, place)
    y.copy_(wide)


def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    rows = x.reshape(x.shape[0], groups, -1)
    centred = rows - rows.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)  # what rounding left of a large mean
    rows = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = rows.view(x.shape)
    if weight is not None:
        y = y * match(weight, y).view(_COLUMN)
    return y if bias is None else y + match(bias, y).view(_COLUMN)
