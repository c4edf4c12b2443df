"""Keys in int8 and values in e4m3 in plain torch."""

from __future__ import annotations

from torch import Tensor

from svg_kernels.key_value_fp8.rows import (
    KEY_DTYPE,
    LARGEST_KEY,
    LARGEST_VALUE,
    SMALLEST,
    VALUE_DTYPE,
    level_channels,
    rotate,
)


def quantize_key_value(key: Tensor, value: Tensor, order: Tensor | None) -> tuple[Tensor, ...]:
    """Return the tensors of `Fp8KeyValue`; arithmetic is in fp32."""
    key, value = key.float(), value.float()
    key_mean, value_mean = key.mean(dim=2), value.mean(dim=2)
    key, value = key - key_mean[:, :, None], value - value_mean[:, :, None]
    key_scale = level_channels(key.square().mean(dim=2).sqrt())
    value_scale = (value.abs().amax(dim=2) / LARGEST_VALUE).clamp_min(SMALLEST)
    key = rotate(key / key_scale[:, :, None])
    step = (key.abs().amax(dim=(2, 3)) / LARGEST_KEY).clamp_min(SMALLEST)[..., None]
    if order is not None:
        index = order.long()[..., None].expand(*order.shape, key.shape[-1])
        key, value = key.gather(2, index), value.gather(2, index)
    key_bytes = (key / step[..., None]).round().clamp(-LARGEST_KEY, LARGEST_KEY).to(KEY_DTYPE)
    value = (value / value_scale[:, :, None]).clamp(-LARGEST_VALUE, LARGEST_VALUE)
    value_bytes = value.to(VALUE_DTYPE)
    return (
        key_bytes.contiguous(),
        value_bytes.contiguous(),
        key_scale * step,
        key_mean,
        value_scale,
        value_mean,
    )
