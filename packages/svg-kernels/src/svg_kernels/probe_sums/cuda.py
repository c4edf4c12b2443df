"""Launcher of the compiled kernel: lay out scratch, describe the tensors, launch."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from svg_kernels import _library
from svg_kernels.probe_sums.limits import TILE_ROWS

# As in csrc/attention/probe_sums_sm90a.cu: probes of a thread block, without outputs and with them.
BLOCK_PROBES = (192, 128)
_STAGE_ROWS = 128
_COLUMNS = 8  # segments that a stage can meet
_LEAST_ROWS = 19  # of a segment and its mean key, so that a stage meets no ninth
_VECTOR = 8  # elements of 16 bytes


def probe_sums(
    probes: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    centroids: Tensor,
    value_means: Tensor,
    sizes: Tensor,
    length: int,
    probe_rows: int,
    scale: float,
    largest_bias: float,
    error: Tensor,
    bias: Tensor,
    output: Tensor,
    lse: Tensor,
) -> None:
    """Launch both kernels on the current stream; see `svg_kernels.probe_sums`."""
    batch, heads, count, width = probes.shape
    key_heads, rows, segments = order.shape[1], order.shape[2], sizes.shape[2]
    device = probes.device
    # What the kernel lists: a segment's keys, its mean key, and rows that only fill up.
    listed = torch.where(sizes > 0, (sizes + 1).clamp(min=_LEAST_ROWS), 0)
    list_starts = torch.nn.functional.pad(listed.cumsum(-1, dtype=torch.int32), (1, 0))
    columns = ((sizes > 0).cumsum(-1, dtype=torch.int32) - 1) % _COLUMNS
    starts = sizes.cumsum(-1, dtype=torch.int32) - sizes
    constants = (value_means.float() * sizes[..., None]).sum(2) / rows
    stages = -(-(rows + _LEAST_ROWS * segments) // _STAGE_ROWS)
    capacity = stages * _STAGE_ROWS
    places = torch.empty(batch, key_heads, capacity, dtype=torch.int32, device=device)
    marks = places.new_empty(batch, key_heads, capacity, 2)
    endings = places.new_full((batch, key_heads, stages, _COLUMNS, 2), -1)
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    block = BLOCK_PROBES[lse.numel() > 0]
    needed = min(programs, batch * heads * -(-count // block))
    scratch = torch.empty(needed, block, segments, 2, device=device)
    wanted = (output, lse) if lse.numel() else (None, None)
    # Copies must outlive the launch, so they keep a name until it returns.
    key, value = _aligned(key), _aligned(value)
    tensors = (
        probes.contiguous(), key, value, order.contiguous(), centroids.contiguous(),
        value_means.contiguous(), constants, sizes.contiguous(), starts, list_starts, columns,
        places, marks, endings, scratch, error, bias, *wanted,
    )  # fmt: skip
    described = array("q", [0 if x is None else x.data_ptr() for x in tensors])
    described.extend((*key.stride()[:3], *value.stride()[:3], batch, length, capacity))
    described.extend((heads, key_heads, count, rows, segments, error.shape[2]))
    described.extend((TILE_ROWS // probe_rows, probe_rows, needed, width))
    _library.functions(device).probe_sums(
        described.buffer_info()[0],
        scale,
        largest_bias,
        device.index,
        torch._C._cuda_getCurrentRawStream(device.index),
    )


def _aligned(x: Tensor) -> Tensor:
    """Return `x` if its rows can be read 16 bytes at a time, else a contiguous copy."""
    batch, head, row, column = x.stride()
    fits = batch % _VECTOR == 0 and head % _VECTOR == 0 and row % _VECTOR == 0
    return x if fits and column == 1 and x.data_ptr() % 16 == 0 else x.contiguous()
