"""Keys and values in e4m3 in plain torch."""

from __future__ import annotations

from torch import Tensor

from svg_kernels.key_value_fp8.rows import DTYPE, LARGEST, SMALLEST, key_scales, rotate


def quantize_key_value(key: Tensor, value: Tensor, order: Tensor | None) -> tuple[Tensor, ...]:
    """Return the tensors of `Fp8KeyValue`; arithmetic is in fp32."""
    key, value = key.float(), value.float()
    key_mean, value_mean = key.mean(dim=2), value.mean(dim=2)
    key, value = key - key_mean[:, :, None], value - value_mean[:, :, None]
    key_scale = key_scales(key.square().mean(dim=2).sqrt())
    value_scale = (value.abs().amax(dim=2) / LARGEST).clamp_min(SMALLEST)
    if order is not None:
        index = order.long()[..., None].expand(*order.shape, key.shape[-1])
        key, value = key.gather(2, index), value.gather(2, index)
    key_bytes = to_bytes(rotate(key / key_scale[:, :, None]))
    value_bytes = to_bytes(value / value_scale[:, :, None])
    return key_bytes, value_bytes, key_scale, key_mean, value_scale, value_mean


def to_bytes(x: Tensor) -> Tensor:
    """Round to e4m3; what is too large becomes the largest number."""
    return x.clamp(-LARGEST, LARGEST).to(DTYPE).contiguous()
