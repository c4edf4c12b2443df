"""Keys in 8-bit integers in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels.key_int8.rows import LARGEST, SMALLEST, channel_scales, finite
from svg_kernels.rotation import rotate


def quantize_key(key: Tensor, order: Tensor | None) -> tuple[Tensor, ...]:
    """Return the tensors of `Int8Key`; arithmetic is in fp32."""
    key = key.float()
    known = finite(key)
    mean = known.mean(dim=2)
    deviation = (known - mean[:, :, None]).square().mean(dim=2).sqrt()
    channel_scale = channel_scales(deviation)
    if order is not None:
        key = key.gather(2, order.long()[..., None].expand(*order.shape, key.shape[-1]))
    rotated = rotate((key - mean[:, :, None]) / channel_scale[:, :, None])
    row_scale = rotated.abs().amax(dim=-1).clamp_min(SMALLEST) / LARGEST
    integers = finite(rotated / row_scale[..., None]).round().clamp(-LARGEST, LARGEST)
    row_scale = torch.where(row_scale.isfinite(), row_scale, torch.nan)
    return integers.to(torch.int8).contiguous(), row_scale, channel_scale, mean
