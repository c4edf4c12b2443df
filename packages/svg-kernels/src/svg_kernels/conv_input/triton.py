"""What a convolution reads, in Triton: moments of slices, then of groups, then the result.

Channels lie side by side, so that a tile of positions and channels is read along memory whatever
is done to the positions: a repeated or padded one is a row that is read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_kernels.norm.triton import reciprocal_std

# Positions and channels of a tile; a program sums so many tiles of moments one after the other.
TILE, MOST_CHANNELS, TILES = 4096, 128, 8
BLOCK_SLICES = 64


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
    # Sums of what is left beside one value of each channel: nothing cancels in their squares.
    origin = _address(first, height, width, xt, xh, xw)
    shift = tl.load(x_ptr + origin, inside, 0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(TILES):
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
    mean_ptr, square_ptr, weight_ptr, center_ptr, scale_ptr, positions, slices, channels, size, eps,
    HAS_WEIGHT: tl.constexpr, LENGTH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write by what each channel of a group is shifted and scaled, from slices of its positions."""
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    within = tl.arange(0, BLOCK_C)
    channel, inside = group * size + within, within < size
    mean_ptr += batch * slices * channels + channel
    square_ptr += batch * slices * channels + channel
    sums = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    start = 0
    while start < slices:
        number = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        mask = (number < slices)[:, None] & inside[None, :]
        count = tl.minimum(positions - number * LENGTH, LENGTH).to(tl.float32)[:, None]
        mean = tl.load(mean_ptr[None, :] + (number * channels)[:, None], mask, 0.0)
        sums += tl.where(mask, mean * (count / positions), 0.0)
        start += BLOCK_S
    center = tl.sum(sums) / size
    squares = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    start = 0
    while start < slices:
        number = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        mask = (number < slices)[:, None] & inside[None, :]
        count = tl.minimum(positions - number * LENGTH, LENGTH).to(tl.float32)[:, None]
        at = (number * channels)[:, None]
        apart = tl.load(mean_ptr[None, :] + at, mask, 0.0) - center
        square = tl.load(square_ptr[None, :] + at, mask, 0.0) + count * apart * apart
        squares += tl.where(mask, square / positions, 0.0)
        start += BLOCK_S
    scale = reciprocal_std(tl.sum(squares), size, eps) + tl.zeros((BLOCK_C,), tl.float32)
    if HAS_WEIGHT:
        scale = scale * tl.load(weight_ptr + channel, inside, 0.0).to(tl.float32)
    out = batch * channels + channel
    tl.store(center_ptr + out, center + tl.zeros((BLOCK_C,), tl.float32), inside)
    tl.store(scale_ptr + out, scale, inside)


@triton.jit(do_not_specialize=("frames", "height", "width", "rows", "columns"))
def conv_input_kernel(
    x_ptr, y_ptr, center_ptr, scale_ptr, bias_ptr,
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
        center = tl.load(center_ptr + vector, inside, 0.0)
        scale = tl.load(scale_ptr + vector, inside, 0.0)
        y = (y - center[None, :]) * scale[None, :]
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
    batch, channels, frames, height, width = x.shape
    strides = (x.stride(0), *x.stride()[2:])
    times, rows, columns = y.shape[2:]
    block_c = min(MOST_CHANNELS, max(16, triton.next_power_of_2(channels)))
    parts, block_r = triton.cdiv(channels, block_c), TILE // block_c
    center = scale = None
    if groups:
        center, scale = (x.new_empty(batch, channels, dtype=torch.float32) for _ in range(2))
        positions = frames * height * width
        length = TILES * block_r
        slices = triton.cdiv(positions, length)
        mean, square = (x.new_empty(batch, slices, channels, dtype=torch.float32) for _ in "ab")
        slice_moments_kernel[(slices, batch, parts)](
            x, mean, square, positions, height, width, channels, *strides, slices,
            TILES=TILES, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
        size = channels // groups
        group_moments_kernel[(groups, batch)](
            mean, square, weight, center, scale, positions, slices, channels, size, eps,
            HAS_WEIGHT=weight is not None, LENGTH=length, BLOCK_S=BLOCK_SLICES,
            BLOCK_C=triton.next_power_of_2(size), num_warps=4,
        )  # fmt: skip
    left, _, top, _, before, _ = padding
    conv_input_kernel[(batch * times * rows, triton.cdiv(columns, block_r), parts)](
        x, y, center, scale, bias,
        frames, height, width, channels, *strides, times, rows, columns, before, top, left,
        NORM=groups > 0, HAS_BIAS=bias is not None, SILU=silu,
        UP_T=upsample[0], UP_H=upsample[1], UP_W=upsample[2],
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
