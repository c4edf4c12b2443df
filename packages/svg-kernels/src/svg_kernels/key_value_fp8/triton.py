"""Keys in int8 and values in e4m3 in Triton.

One pass over both for statistics, one over the keys for the largest element once they are rotated,
and one over both that permutes and rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_kernels._rows import contiguous_rows
from svg_kernels.key_value_fp8.rows import (
    HEAD_DIM,
    KEY_DTYPE,
    LARGEST_KEY,
    LARGEST_VALUE,
    SMALLEST,
    VALUE_DTYPE,
    level_channels,
    signed_hadamard,
)

STATISTICS = 5  # sum and sum of squares of keys; sum, least and largest of values
CHUNK_ROWS = 2048  # rows whose statistics one program gathers
BLOCK_ROWS = 64


@triton.jit
def statistics_kernel(
    key_ptr, value_ptr, out_ptr, heads, rows, kb, kh, ks, vb, vh, vs, chunks,
    CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gather the statistics of `CHUNK` rows of one head, by channel.

    Those of the keys are of their distance from the first row, so that an offset common to all
    costs no digits.
    """
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // heads, place % heads
    chunk = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, D)
    keys = key_ptr + batch * kb + head * kh + channel[None, :]
    values = value_ptr + batch * vb + head * vh + channel[None, :]
    first = tl.load(key_ptr + batch * kb + head * kh + channel).to(tl.float32)[None, :]
    key_sum = tl.zeros([D], dtype=tl.float32)
    key_squares = tl.zeros([D], dtype=tl.float32)
    value_sum = tl.zeros([D], dtype=tl.float32)
    least = tl.full([D], float("inf"), dtype=tl.float32)
    largest = tl.full([D], float("-inf"), dtype=tl.float32)
    for start in range(0, CHUNK, BLOCK_S):
        row = chunk * CHUNK + start + tl.arange(0, BLOCK_S)
        mask = (row < rows)[:, None]
        key = tl.load(keys + row[:, None] * ks, mask, 0.0).to(tl.float32)
        key = tl.where(mask, key - first, 0.0)
        value = tl.load(values + row[:, None] * vs, mask, 0.0).to(tl.float32)
        key_sum += tl.sum(key, 0)
        key_squares += tl.sum(key * key, 0)
        value_sum += tl.sum(value, 0)
        least = tl.minimum(least, tl.min(tl.where(mask, value, float("inf")), 0))
        largest = tl.maximum(largest, tl.max(tl.where(mask, value, float("-inf")), 0))
    out = out_ptr + (place * chunks + chunk) * (5 * D) + channel
    tl.store(out, key_sum)
    tl.store(out + D, key_squares)
    tl.store(out + 2 * D, value_sum)
    tl.store(out + 3 * D, least)
    tl.store(out + 4 * D, largest)


@triton.jit
def rotated_keys(keys, rotation_ptr, means, scales, source, mask, row_stride, D: tl.constexpr):
    """Return rows of one head less their mean, levelled and rotated, fp32 `[BLOCK_S, D]`."""
    channel = tl.arange(0, D)
    key = tl.load(keys + source[:, None] * row_stride + channel[None, :], mask, 0.0).to(tl.float32)
    mean = tl.load(means + channel)
    scale = tl.load(scales + channel)
    key = tl.where(mask, (key - mean[None, :]) / scale[None, :], 0.0)
    key = tl.minimum(tl.maximum(key, -32768.0), 32768.0).to(tl.float16)
    # The matrix transposed.
    rotation = tl.load(rotation_ptr + channel[None, :] * D + channel[:, None])
    return tl.dot(key, rotation) * 0.08838834764831845


@triton.jit
def largest_key_kernel(
    key_ptr, rotation_ptr, mean_ptr, scale_ptr, out_ptr, heads, rows, kb, kh, ks, chunks,
    CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Find the largest element of `CHUNK` rotated rows of one head."""
    place = tl.program_id(0).to(tl.int64)
    keys = key_ptr + place // heads * kb + place % heads * kh
    chunk = tl.program_id(1).to(tl.int64)
    largest = tl.zeros([BLOCK_S], dtype=tl.float32)
    for start in tl.range(0, CHUNK, BLOCK_S, num_stages=1):  # fetching ahead takes 112 KB
        row = chunk * CHUNK + start + tl.arange(0, BLOCK_S)
        key = rotated_keys(
            keys, rotation_ptr, mean_ptr + place * D, scale_ptr + place * D, row,
            (row < rows)[:, None], ks, D,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(tl.abs(key), 1))
    tl.store(out_ptr + place * chunks + chunk, tl.max(largest, 0))


@triton.jit
def quantize_key_value_kernel(
    key_ptr, value_ptr, order_ptr, rotation_ptr,
    key_mean_ptr, key_scale_ptr, value_mean_ptr, value_scale_ptr, key_out_ptr, value_out_ptr,
    heads, count, kb, kh, ks, vb, vh, vs, ob, oh,
    HAS_ORDER: tl.constexpr, LARGEST_KEY: tl.constexpr, LARGEST_VALUE: tl.constexpr,
    BLOCK_S: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Permute, centre, rotate (keys) and round `BLOCK_S` rows of one head."""
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // heads, place % heads
    row = tl.program_id(1).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = (row < count)[:, None]
    source = row
    if HAS_ORDER:
        source = tl.load(order_ptr + batch * ob + head * oh + row, row < count, 0).to(tl.int64)
    channel = tl.arange(0, D)
    out = place * count * D + row[:, None] * D + channel[None, :]

    key = rotated_keys(
        key_ptr + batch * kb + head * kh, rotation_ptr, key_mean_ptr + place * D,
        key_scale_ptr + place * D, source, mask, ks, D,
    )  # fmt: skip
    key = tl.minimum(tl.maximum(key, -LARGEST_KEY), LARGEST_KEY)
    # A conversion to integers cuts off.
    key = tl.where(key < 0, key - 0.5, key + 0.5)
    tl.store(key_out_ptr + out, key.to(key_out_ptr.dtype.element_ty), mask)

    values = value_ptr + batch * vb + head * vh + channel[None, :]
    value = tl.load(values + source[:, None] * vs, mask, 0.0).to(tl.float32)
    mean = tl.load(value_mean_ptr + place * D + channel)
    scales = tl.load(value_scale_ptr + place * D + channel)
    value = (value - mean[None, :]) / scales[None, :]
    value = tl.minimum(tl.maximum(value, -LARGEST_VALUE), LARGEST_VALUE)
    tl.store(value_out_ptr + out, value.to(value_out_ptr.dtype.element_ty), mask)


def quantize_key_value(key: Tensor, value: Tensor, order: Tensor | None) -> tuple[Tensor, ...]:
    """Launch the three kernels; see `reference`."""
    key, value = contiguous_rows(key), contiguous_rows(value)
    key_scale, key_mean, value_scale, value_mean = _statistics(key, value)
    batch, heads, rows, width = key.shape
    count = rows if order is None else order.shape[-1]
    shape = (batch, heads, count, width)
    key_bytes = torch.empty(shape, dtype=KEY_DTYPE, device=key.device)
    value_bytes = torch.empty(shape, dtype=VALUE_DTYPE, device=key.device)
    if order is not None:
        order = contiguous_rows(order)
    rotation = signed_hadamard(key.device, torch.float16)
    chunks = triton.cdiv(rows, CHUNK_ROWS)
    largest = torch.empty(batch, heads, chunks, dtype=torch.float32, device=key.device)
    largest_key_kernel[(batch * heads, chunks)](
        key, rotation, key_mean, key_scale, largest, heads, rows, *key.stride()[:3], chunks,
        CHUNK=CHUNK_ROWS, BLOCK_S=BLOCK_ROWS, D=HEAD_DIM,
    )  # fmt: skip
    step = (largest.amax(dim=2, keepdim=True) / LARGEST_KEY).clamp_min(SMALLEST)
    key_scale = key_scale * step
    quantize_key_value_kernel[(batch * heads, triton.cdiv(count, BLOCK_ROWS))](
        key, value, order, rotation,
        key_mean, key_scale, value_mean, value_scale, key_bytes, value_bytes,
        heads, count, *key.stride()[:3], *value.stride()[:3],
        *(order.stride()[:2] if order is not None else (0, 0)),
        HAS_ORDER=order is not None, LARGEST_KEY=LARGEST_KEY, LARGEST_VALUE=LARGEST_VALUE,
        BLOCK_S=BLOCK_ROWS, D=HEAD_DIM,
    )  # fmt: skip
    return key_bytes, value_bytes, key_scale, key_mean, value_scale, value_mean


def _statistics(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what levels keys and their mean, then the scale and mean of values."""
    batch, heads, rows, width = key.shape
    chunks = triton.cdiv(rows, CHUNK_ROWS)
    shape = (batch, heads, chunks, STATISTICS, width)
    found = torch.empty(shape, dtype=torch.float32, device=key.device)
    statistics_kernel[(batch * heads, chunks)](
        key, value, found, heads, rows, *key.stride()[:3], *value.stride()[:3], chunks,
        CHUNK=CHUNK_ROWS, BLOCK_S=BLOCK_ROWS, D=HEAD_DIM,
    )  # fmt: skip
    key_sum, key_squares, value_sum = found[:, :, :, :3].sum(dim=2).unbind(dim=2)
    least, largest = found[:, :, :, 3].amin(dim=2), found[:, :, :, 4].amax(dim=2)
    shift = key_sum / rows
    variance = key_squares / rows - shift.square()
    key_scale = level_channels(variance.clamp_min(0).sqrt())
    value_mean = value_sum / rows
    spread = torch.maximum(largest - value_mean, value_mean - least)
    value_scale = (spread / LARGEST_VALUE).clamp_min(SMALLEST)
    return key_scale, key[:, :, 0].float() + shift, value_scale, value_mean
