"""Launcher of the compiled kernels: describe the tensors, launch."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from svg_kernels import _library
from svg_kernels.attention.operands import Operands

_CODES = {torch.float16: 1, torch.bfloat16: 2}
_VECTOR = 16  # bytes


def block_sparse_attention(operands: Operands, out: Tensor, lse: Tensor | None) -> None:
    """Launch the kernel on the current stream; see `svg_kernels.block_sparse_attention`."""
    tiles = operands.run_starts.shape[:3].numel()
    # How many tiles, and which, hold what is not finite: they are computed once more.
    spoiled = torch.zeros(1 + tiles, dtype=torch.int32, device=operands.query.device)
    function = _library.functions(operands.query.device).block_sparse_attention
    launch(function, operands, out, lse, (spoiled,))


def launch(
    function: Callable[..., Any],
    operands: Operands,
    out: Tensor,
    lse: Tensor | None,
    others: tuple[Tensor, ...],
) -> None:
    """Describe a call to one of the compiled kernels and launch it on the current stream.

    Args:
        function: the launcher.
        operands: what the kernel reads.
        out: where the output goes; any strides.
        lse: where the log-sum-exps go, or None.
        others: further tensors, contiguous, whose addresses follow the description.
    """
    # Copies must outlive the launch, so they keep a name until it returns.
    query, key = _vectors(operands.query), _sequences(operands.key)
    value = _sequences(operands.value)
    target = (
        out if _aligned(out) else torch.empty_like(query, memory_format=torch.contiguous_format)
    )
    starts, lengths, order, *summary, tiles = (_packed(x) for x in operands[3:10])
    pointers = (query, key, value, target, lse, order, starts, lengths, tiles, *summary)
    summaries = 0 if summary[0] is None else summary[0].shape[2]
    described = array("q", [0 if x is None else x.data_ptr() for x in pointers])
    described.extend(query.stride()[:3])
    described.extend(target.stride()[:3])
    described.extend((*_steps(key), *_steps(value)))
    described.extend((query.shape[0], query.shape[1], key.shape[1], query.shape[2], key.shape[2]))
    described.extend((operands.run_starts.shape[-1], summaries))
    described.extend((query.shape[3], _CODES[query.dtype]))
    described.extend(x.data_ptr() for x in others)
    device = query.device.index
    function(
        described.buffer_info()[0],
        operands.scale,
        device,
        torch._C._cuda_getCurrentRawStream(device),
    )
    if target is not out:
        out.copy_(target)


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _vectors(x: Tensor) -> Tensor:
    """Return `x` if its rows can be read 16 bytes at a time, else a contiguous copy."""
    return x if _aligned(x) else x.contiguous()


def _aligned(x: Tensor) -> bool:
    """Return whether every row starts at a multiple of 16 bytes and is contiguous."""
    batch, head, row, column = x.stride()
    step = _VECTOR // x.element_size()
    steps_fit = batch % step == 0 and head % step == 0 and row % step == 0
    return steps_fit and column == 1 and x.data_ptr() % _VECTOR == 0


def _sequences(x: Tensor) -> Tensor:
    """Return `x` if its batch and heads are evenly spaced sequences of rows, else a copy."""
    x = _vectors(x)
    batch, heads = x.shape[:2]
    even = batch == 1 or heads == 1 or x.stride(0) == heads * x.stride(1)
    return x if even and min(_steps(x)) >= x.shape[3] else x.contiguous()


def _steps(x: Tensor) -> tuple[int, int]:
    """Return the elements from one sequence to the next, and from one row to the next."""
    batch, heads, rows, width = x.shape
    row = x.stride(2) if rows > 1 else width
    if heads > 1:
        return x.stride(1), row
    return (x.stride(0) if batch > 1 else rows * row), row
