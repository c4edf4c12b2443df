"""What a convolution reads, in Triton: moments of slices, then of groups, then the result.

Channels lie side by side, so that a tile of positions and channels is read along memory whatever
is done to the positions: a repeated or padded one is a row that is read again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_kernels._rows import contiguous_rows
from svg_kernels.norm.triton import reciprocal_std

# Values of a tile and threads for it, of moments and of results; channels of either, and how many
# tiles of moments a program takes one after the other.
MOMENTS_TILE, MOMENTS_WARPS, TILES = 4096, 8, 16
INPUT_TILE, INPUT_WARPS = 4096, 4
MOST_CHANNELS, BLOCK_SLICES = 128, 64


@triton.jit
def _address(row, height, width, xt, xh, xw):
    """Return where a position, counted through time, rows and columns, begins."""
    column, rest = row % width, row // width
    return (rest // height).to(tl.int64) * xt + (rest % height).to(tl.int64) * xh + column * xw


@triton.jit(do_not_specialize=("positions", "height", "width"))
def slice_moments_kernel(
    x_ptr, mean_ptr, square_ptr, positions, height, width, channels, xb, xt, xh, xw, slices,
    TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write mean and squared deviations of each channel over `TILES * BLOCK_R` positions."""
    number, batch = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    x_ptr += batch.to(tl.int64) * xb + channel
    first = number.to(tl.int64) * TILES * BLOCK_R
    row = first + tl.arange(0, BLOCK_R)
    mask = (row < positions)[:, None] & inside[None, :]
    at = _address(row, height, width, xt, xh, xw)
    x = tl.load(x_ptr[None, :] + at[:, None], mask, 0.0).to(tl.float32)
    # Sums of what is left beside the mean of a tile: little cancels in their squares.
    shift = tl.sum(x, 0) / tl.minimum(positions - first, BLOCK_R).to(tl.float32)
    sums = tl.where(mask, x - shift[None, :], 0.0)
    squares = sums * sums
    for tile in range(1, TILES):
        row = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < positions)[:, None] & inside[None, :]
        at = _address(row, height, width, xt, xh, xw)
        x = tl.load(x_ptr[None, :] + at[:, None], mask, 0.0).to(tl.float32)
        x = tl.where(mask, x - shift[None, :], 0.0)
        sums += x
        squares += x * x
    count = tl.minimum(positions - first, TILES * BLOCK_R).to(tl.float32)
    total = tl.sum(sums, 0)
    out = (batch.to(tl.int64) * slices + number) * channels + channel
    tl.store(mean_ptr + out, shift + total / count, inside)
    tl.store(square_ptr + out, tl.sum(squares, 0) - total * (total / count), inside)


@triton.jit(do_not_specialize=("positions", "slices"))
def group_moments_kernel(
    mean_ptr, square_ptr, offset_ptr, weight_ptr, base_ptr, center_ptr, scale_ptr,
    positions, slices, channels, size, eps,
    HAS_OFFSET: tl.constexpr, HAS_WEIGHT: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write by what each channel of a group is shifted and scaled, from slices of its positions.

    The shift is the sum of a number near the mean and what is left beside it: a mean far from 0
    has fewer digits than that.
    """
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    within = tl.arange(0, BLOCK_C)
    channel, inside = group * size + within, within < size
    mean_ptr += batch * slices * channels
    square_ptr += batch * slices * channels
    base = tl.load(mean_ptr + group * size)
    offset = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_OFFSET:
        offset = tl.load(offset_ptr + channel, inside, 0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    start = 0
    while start < slices:
        number = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        mask = (number < slices)[:, None] & inside[None, :]
        count = tl.minimum(positions - number * LENGTH, LENGTH).to(tl.float32)[:, None]
        mean = tl.load(mean_ptr + (number * channels)[:, None] + channel[None, :], mask, 0.0)
        apart = mean - base + offset[None, :]
        sums += tl.where(mask, apart * (count / positions), 0.0)
        start += BLOCK_S
    center = tl.sum(sums) / size
    squares = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    start = 0
    while start < slices:
        number = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        mask = (number < slices)[:, None] & inside[None, :]
        count = tl.minimum(positions - number * LENGTH, LENGTH).to(tl.float32)[:, None]
        at = (number * channels)[:, None] + channel[None, :]
        apart = tl.load(mean_ptr + at, mask, 0.0) - base + offset[None, :] - center
        square = tl.load(square_ptr + at, mask, 0.0) + count * apart * apart
        squares += tl.where(mask, square / positions, 0.0)
        start += BLOCK_S
    scale = reciprocal_std(tl.sum(squares), size, eps) + tl.zeros((BLOCK_C,), tl.float32)
    if HAS_WEIGHT:
        scale = scale * tl.load(weight_ptr + channel, inside, 0.0).to(tl.float32)
    out = batch * channels + channel
    tl.store(base_ptr + out, base + tl.zeros((BLOCK_C,), tl.float32), inside)
    tl.store(center_ptr + out, center - offset, inside)
    tl.store(scale_ptr + out, scale, inside)


@triton.jit(do_not_specialize=("frames", "height", "width", "rows", "columns"))
def conv_input_kernel(
    x_ptr, y_ptr, base_ptr, center_ptr, scale_ptr, bias_ptr,
    frames, height, width, channels, xb, xt, xh, xw, times, rows, columns,
    before, top, left,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    UP_T: tl.constexpr, UP_H: tl.constexpr, UP_W: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write `BLOCK_R` columns of one row of the result."""
    line = tl.program_id(0)
    row, rest = line % rows, line // rows
    time, batch = rest % times, (rest // times).to(tl.int64)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    # The first frame stands once; those behind it UP_T times.
    source_t = tl.minimum((tl.maximum(time - before, 0) + UP_T - 1) // UP_T, frames - 1)
    source_h = tl.minimum(tl.maximum(row - top, 0) // UP_H, height - 1)
    column = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    source_w = tl.minimum(tl.maximum(column - left, 0) // UP_W, width - 1).to(tl.int64)
    mask = (column < columns)[:, None] & inside[None, :]
    x_ptr += batch * xb + source_t.to(tl.int64) * xt + source_h.to(tl.int64) * xh
    y = tl.load(x_ptr + (source_w * xw)[:, None] + channel[None, :], mask, 0.0).to(tl.float32)
    if NORM:
        vector = batch * channels + channel
        base = tl.load(base_ptr + vector, inside, 0.0)
        center = tl.load(center_ptr + vector, inside, 0.0)
        scale = tl.load(scale_ptr + vector, inside, 0.0)
        y = (y - base[None, :] - center[None, :]) * scale[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + channel, inside, 0.0).to(tl.float32)[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    y_ptr += line.to(tl.int64) * columns * channels
    out = column.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask)


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
    """Launch the kernels; see `reference.conv_input`."""
    if y.numel() == 0:
        return
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    weight, bias, offset = (
        None if t is None else contiguous_rows(t) for t in (weight, bias, offset)
    )
    batch, channels, frames, height, width = x.shape
    strides = (x.stride(0), *x.stride()[2:])
    times, rows, columns = y.shape[2:]
    block_c = min(MOST_CHANNELS, max(16, triton.next_power_of_2(channels)))
    parts = triton.cdiv(channels, block_c)
    moments: Sequence[Tensor | None] = (None, None, None)
    if groups:
        moments = tuple(x.new_empty(batch, channels, dtype=torch.float32) for _ in range(3))
        positions, block_r = frames * height * width, MOMENTS_TILE // block_c
        slices = triton.cdiv(positions, TILES * block_r)
        sums = [x.new_empty(batch, slices, channels, dtype=torch.float32) for _ in range(2)]
        slice_moments_kernel[(slices, batch, parts)](
            x, *sums, positions, height, width, channels, *strides, slices,
            TILES=TILES, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=MOMENTS_WARPS,
        )  # fmt: skip
        size = channels // groups
        group_moments_kernel[(groups, batch)](
            *sums, offset, weight, *moments, positions, slices, channels, size, eps,
            HAS_OFFSET=offset is not None, HAS_WEIGHT=weight is not None,
            LENGTH=TILES * block_r, BLOCK_S=BLOCK_SLICES, BLOCK_C=triton.next_power_of_2(size),
            num_warps=4,
        )  # fmt: skip
    left, _, top, _, before, _ = padding
    block_r = INPUT_TILE // block_c
    conv_input_kernel[(batch * times * rows, triton.cdiv(columns, block_r), parts)](
        x, y, *moments, bias,
        frames, height, width, channels, *strides, times, rows, columns, before, top, left,
        NORM=groups > 0, HAS_BIAS=bias is not None, SILU=silu,
        UP_T=upsample[0], UP_H=upsample[1], UP_W=upsample[2],
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=INPUT_WARPS,
    )  # fmt: skip
