"""Keys in 8-bit integers in Triton: a pass for statistics, then one that permutes and rounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_kernels._rows import contiguous_rows
from svg_kernels.key_int8.rows import BALANCED, LARGEST, SMALLEST
from svg_kernels.rotation import HEAD_DIM, signed_hadamard

CHUNK_ROWS = 2048  # rows whose statistics one program gathers
STATISTICS_ROWS = 16  # that it holds at once
BLOCK_ROWS = 64  # that one program rounds


@triton.jit
def _finite(x):
    """Return 0 for what is not a finite number.

    Not by `x - x`: where `x` is a product, the compiler fuses it with the difference, and what was
    rounded off is left.
    """
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def statistics_kernel(
    key_ptr, out_ptr, heads, rows, kb, kh, ks, chunks,
    CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sum `CHUNK` rows of one head, and their squares, by channel.

    They are taken from the first row, so that an offset common to all costs no digits. Each lane
    keeps its own sums until the end, where rows meet once.
    """
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // heads, place % heads
    chunk = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, D)
    keys = key_ptr + batch * kb + head * kh + channel[None, :]
    first = _finite(tl.load(key_ptr + batch * kb + head * kh + channel).to(tl.float32))[None, :]
    total = tl.zeros([BLOCK_S, D], dtype=tl.float32)
    squares = tl.zeros([BLOCK_S, D], dtype=tl.float32)
    for start in range(0, CHUNK, BLOCK_S):
        row = chunk * CHUNK + start + tl.arange(0, BLOCK_S)
        mask = (row < rows)[:, None]
        key = tl.load(keys + row[:, None] * ks, mask, 0.0).to(tl.float32)
        key = _finite(tl.where(mask, key - first, 0.0))
        total += key
        squares += key * key
    out = out_ptr + (place * chunks + chunk) * (2 * D) + channel
    tl.store(out, tl.sum(total, 0))
    tl.store(out + D, tl.sum(squares, 0))


@triton.jit
def scales_kernel(
    key_ptr, found_ptr, mean_ptr, scale_ptr, heads, rows, kb, kh, chunks,
    BALANCED: tl.constexpr, SMALLEST: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Join the statistics of a head's chunks to means and scales; see `rows.channel_scales`."""
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // heads, place % heads
    channel = tl.arange(0, D)
    total = tl.zeros([D], dtype=tl.float32)
    squares = tl.zeros([D], dtype=tl.float32)
    for chunk in range(chunks):
        found = found_ptr + (place * chunks + chunk) * (2 * D) + channel
        total += tl.load(found)
        squares += tl.load(found + D)
    shift = total / rows
    deviation = tl.sqrt(tl.maximum(squares / rows - shift * shift, 0.0))
    mean = tl.maximum(tl.sum(deviation, 0) / D, SMALLEST)
    first = _finite(tl.load(key_ptr + batch * kb + head * kh + channel).to(tl.float32))
    tl.store(mean_ptr + place * D + channel, first + shift)
    scale = tl.sqrt(tl.maximum(deviation / (BALANCED * mean), 1.0))
    tl.store(scale_ptr + place * D + channel, scale)


@triton.jit
def quantize_key_kernel(
    key_ptr, order_ptr, rotation_ptr, mean_ptr, scale_ptr, out_ptr, row_scale_ptr,
    heads, count, kb, kh, ks, ob, oh,
    HAS_ORDER: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
    BLOCK_S: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Permute, centre, rotate and round `BLOCK_S` rows of one head.

    Rows are rotated in fp16, which has three digits more than the integers, after they have been
    divided by their largest element. Divisions are by row and by channel.
    """
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // heads, place % heads
    row = tl.program_id(1).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = row < count
    source = row
    if HAS_ORDER:
        source = tl.load(order_ptr + batch * ob + head * oh + row, mask, 0).to(tl.int64)
    channel = tl.arange(0, D)
    keys = key_ptr + batch * kb + head * kh + channel[None, :]
    key = tl.load(keys + source[:, None] * ks, mask[:, None], 0.0).to(tl.float32)
    mean = tl.load(mean_ptr + place * D + channel)
    factor = 1.0 / tl.load(scale_ptr + place * D + channel)
    key = (key - mean[None, :]) * factor[None, :]
    known = tl.min(tl.where(tl.abs(key) < float("inf"), 1, 0), 1)  # 0 in a row that is not finite
    key = _finite(key)
    largest = tl.maximum(tl.max(tl.abs(key), 1), SMALLEST)
    key = (key * (1.0 / largest)[:, None]).to(tl.float16)
    # The matrix transposed.
    rotation = tl.load(rotation_ptr + channel[None, :] * D + channel[:, None])
    key = tl.dot(key, rotation)
    spread = tl.maximum(tl.max(tl.abs(key), 1), SMALLEST)
    # Added to this, a float's last place is one.
    integer = (key * (LARGEST / spread)[:, None] + 12582912.0) - 12582912.0
    tl.store(
        out_ptr + place * count * D + row[:, None] * D + channel[None, :],
        integer.to(tl.int8),
        mask[:, None],
    )
    scale = spread * largest * (0.08838834764831845 / LARGEST)
    scale = tl.where(known == 1, scale, float("nan"))
    tl.store(row_scale_ptr + place * count + row, scale, mask)


def quantize_key(key: Tensor, order: Tensor | None) -> tuple[Tensor, ...]:
    """Launch the three kernels; see `reference`."""
    key = contiguous_rows(key)
    batch, heads, rows, width = key.shape
    chunks = triton.cdiv(rows, CHUNK_ROWS)

    def fp32(*shape: int) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=torch.float32, device=key.device)

    found, mean, channel_scale = fp32(chunks, 2, width), fp32(width), fp32(width)
    statistics_kernel[(batch * heads, chunks)](
        key, found, heads, rows, *key.stride()[:3], chunks,
        CHUNK=CHUNK_ROWS, BLOCK_S=STATISTICS_ROWS, D=HEAD_DIM,
    )  # fmt: skip
    scales_kernel[(batch * heads,)](
        key, found, mean, channel_scale, heads, rows, *key.stride()[:2], chunks,
        BALANCED=BALANCED, SMALLEST=SMALLEST, D=HEAD_DIM,
    )  # fmt: skip
    count = rows if order is None else order.shape[-1]
    integers = torch.empty(batch, heads, count, width, dtype=torch.int8, device=key.device)
    row_scale = fp32(count)
    if order is not None:
        order = contiguous_rows(order)
    quantize_key_kernel[(batch * heads, triton.cdiv(count, BLOCK_ROWS))](
        key, order, signed_hadamard(key.device, torch.float16), mean, channel_scale,
        integers, row_scale, heads, count, *key.stride()[:3],
        *(order.stride()[:2] if order is not None else (0, 0)),
        HAS_ORDER=order is not None, LARGEST=LARGEST, SMALLEST=SMALLEST,
        BLOCK_S=BLOCK_ROWS, D=HEAD_DIM,
    )  # fmt: skip
    return integers, row_scale, channel_scale, mean
