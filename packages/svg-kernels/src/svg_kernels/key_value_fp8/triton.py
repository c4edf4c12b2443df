"""Keys and values in e4m3 in Triton: a pass for statistics, then one that permutes and rounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_kernels._rows import contiguous_rows
from svg_kernels.key_value_fp8.rows import (
    DTYPE,
    FLATTEST,
    HEAD_DIM,
    LARGEST,
    SMALLEST,
    signed_hadamard,
)

STATISTICS = 5  # sum and sum of squares of keys; sum, least and largest of values
CHUNK_ROWS = 2048  # rows whose statistics one program gathers
STATISTICS_ROWS = 16  # that it holds at once
BLOCK_ROWS = 64  # that one program rounds


@triton.jit
def statistics_kernel(
    key_ptr, value_ptr, out_ptr, heads, rows, kb, kh, ks, vb, vh, vs, chunks,
    CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gather the statistics of `CHUNK` rows of one head, by channel.

    Those of the keys are of their distance from the first row, so that an offset common to all
    costs no digits. Each lane keeps its own until the end, where rows meet once.
    """
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // heads, place % heads
    chunk = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, D)
    keys = key_ptr + batch * kb + head * kh + channel[None, :]
    values = value_ptr + batch * vb + head * vh + channel[None, :]
    first = tl.load(key_ptr + batch * kb + head * kh + channel).to(tl.float32)[None, :]
    key_sum = tl.zeros([BLOCK_S, D], dtype=tl.float32)
    key_squares = tl.zeros([BLOCK_S, D], dtype=tl.float32)
    value_sum = tl.zeros([BLOCK_S, D], dtype=tl.float32)
    least = tl.full([BLOCK_S, D], float("inf"), dtype=tl.float32)
    largest = tl.full([BLOCK_S, D], float("-inf"), dtype=tl.float32)
    for start in range(0, CHUNK, BLOCK_S):
        row = chunk * CHUNK + start + tl.arange(0, BLOCK_S)
        mask = (row < rows)[:, None]
        key = tl.load(keys + row[:, None] * ks, mask, 0.0).to(tl.float32)
        key = tl.where(mask, key - first, 0.0)
        value = tl.load(values + row[:, None] * vs, mask, 0.0).to(tl.float32)
        key_sum += key
        key_squares += key * key
        value_sum += value
        least = tl.minimum(least, tl.where(mask, value, float("inf")))
        largest = tl.maximum(largest, tl.where(mask, value, float("-inf")))
    out = out_ptr + (place * chunks + chunk) * (5 * D) + channel
    tl.store(out, tl.sum(key_sum, 0))
    tl.store(out + D, tl.sum(key_squares, 0))
    tl.store(out + 2 * D, tl.sum(value_sum, 0))
    tl.store(out + 3 * D, tl.min(least, 0))
    tl.store(out + 4 * D, tl.max(largest, 0))


@triton.jit
def scales_kernel(
    key_ptr, found_ptr, key_mean_ptr, key_scale_ptr, value_mean_ptr, value_scale_ptr,
    heads, rows, kb, kh, chunks,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, FLATTEST: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Join the statistics of a head's chunks to means and scales; see `rows.key_scales`."""
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // heads, place % heads
    channel = tl.arange(0, D)
    key_sum = tl.zeros([D], dtype=tl.float32)
    key_squares = tl.zeros([D], dtype=tl.float32)
    value_sum = tl.zeros([D], dtype=tl.float32)
    least = tl.full([D], float("inf"), dtype=tl.float32)
    largest = tl.full([D], float("-inf"), dtype=tl.float32)
    for chunk in range(chunks):
        found = found_ptr + (place * chunks + chunk) * (5 * D) + channel
        key_sum += tl.load(found)
        key_squares += tl.load(found + D)
        value_sum += tl.load(found + 2 * D)
        least = tl.minimum(least, tl.load(found + 3 * D))
        largest = tl.maximum(largest, tl.load(found + 4 * D))
    shift = key_sum / rows
    deviation = tl.sqrt(tl.maximum(key_squares / rows - shift * shift, 0.0))
    mean = tl.sum(deviation, 0) / D
    key_scale = tl.maximum(tl.sqrt(deviation * mean), mean * FLATTEST)
    first = tl.load(key_ptr + batch * kb + head * kh + channel).to(tl.float32)
    value_mean = value_sum / rows
    spread = tl.maximum(largest - value_mean, value_mean - least)
    out = place * D + channel
    tl.store(key_mean_ptr + out, first + shift)
    tl.store(key_scale_ptr + out, tl.maximum(key_scale, SMALLEST))
    tl.store(value_mean_ptr + out, value_mean)
    tl.store(value_scale_ptr + out, tl.maximum(spread / LARGEST, SMALLEST))


@triton.jit
def quantize_key_value_kernel(
    key_ptr, value_ptr, order_ptr, rotation_ptr,
    key_mean_ptr, key_scale_ptr, value_mean_ptr, value_scale_ptr, key_out_ptr, value_out_ptr,
    heads, count, kb, kh, ks, vb, vh, vs, ob, oh,
    HAS_ORDER: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Permute, centre, rotate (keys) and round `BLOCK_S` rows of one head.

    Divisions are by channel, since one takes as long as all else that is done to an element. The
    conversion to e4m3 saturates.
    """
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // heads, place % heads
    row = tl.program_id(1).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = (row < count)[:, None]
    source = row
    if HAS_ORDER:
        source = tl.load(order_ptr + batch * ob + head * oh + row, row < count, 0).to(tl.int64)
    channel = tl.arange(0, D)
    out = place * count * D + row[:, None] * D + channel[None, :]

    keys = key_ptr + batch * kb + head * kh + channel[None, :]
    key = tl.load(keys + source[:, None] * ks, mask, 0.0).to(tl.float32)
    mean = tl.load(key_mean_ptr + place * D + channel)
    factor = 1.0 / tl.load(key_scale_ptr + place * D + channel)
    # fp16 has eight binary digits more than e4m3, and no scaled key leaves its range: of S rows
    # none is more than sqrt(S) deviations from their mean, and a scale is at least 1 / sqrt(D) of
    # its channel's deviation.
    key = ((key - mean[None, :]) * factor[None, :]).to(tl.float16)
    # The matrix transposed.
    rotation = tl.load(rotation_ptr + channel[None, :] * D + channel[:, None])
    key = tl.dot(key, rotation) * 0.08838834764831845
    tl.store(key_out_ptr + out, key.to(key_out_ptr.dtype.element_ty), mask)

    values = value_ptr + batch * vb + head * vh + channel[None, :]
    value = tl.load(values + source[:, None] * vs, mask, 0.0).to(tl.float32)
    mean = tl.load(value_mean_ptr + place * D + channel)
    factor = 1.0 / tl.load(value_scale_ptr + place * D + channel)
    value = (value - mean[None, :]) * factor[None, :]
    tl.store(value_out_ptr + out, value.to(value_out_ptr.dtype.element_ty), mask)


def quantize_key_value(key: Tensor, value: Tensor, order: Tensor | None) -> tuple[Tensor, ...]:
    """Launch the three kernels; see `reference`."""
    key, value = contiguous_rows(key), contiguous_rows(value)
    key_scale, key_mean, value_scale, value_mean = _statistics(key, value)
    batch, heads, rows, width = key.shape
    count = rows if order is None else order.shape[-1]
    key_bytes, value_bytes = (
        torch.empty(batch, heads, count, width, dtype=DTYPE, device=key.device) for _ in range(2)
    )
    if order is not None:
        order = contiguous_rows(order)
    quantize_key_value_kernel[(batch * heads, triton.cdiv(count, BLOCK_ROWS))](
        key, value, order, signed_hadamard(key.device, torch.float16),
        key_mean, key_scale, value_mean, value_scale, key_bytes, value_bytes,
        heads, count, *key.stride()[:3], *value.stride()[:3],
        *(order.stride()[:2] if order is not None else (0, 0)),
        HAS_ORDER=order is not None, BLOCK_S=BLOCK_ROWS, D=HEAD_DIM,
    )  # fmt: skip
    return key_bytes, value_bytes, key_scale, key_mean, value_scale, value_mean


def _statistics(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the scale and mean of keys, then of values."""
    batch, heads, rows, width = key.shape
    chunks = triton.cdiv(rows, CHUNK_ROWS)
    shape = (batch, heads, chunks, STATISTICS, width)
    found = torch.empty(shape, dtype=torch.float32, device=key.device)
    statistics_kernel[(batch * heads, chunks)](
        key, value, found, heads, rows, *key.stride()[:3], *value.stride()[:3], chunks,
        CHUNK=CHUNK_ROWS, BLOCK_S=STATISTICS_ROWS, D=HEAD_DIM,
    )  # fmt: skip
    key_scale, key_mean, value_scale, value_mean = (
        found.new_empty(batch, heads, width) for _ in range(4)
    )
    scales_kernel[(batch * heads,)](
        key, found, key_mean, key_scale, value_mean, value_scale,
        heads, rows, *key.stride()[:2], chunks,
        LARGEST=LARGEST, SMALLEST=SMALLEST, FLATTEST=FLATTEST, D=HEAD_DIM,
    )  # fmt: skip
    return key_scale, key_mean, value_scale, value_mean
