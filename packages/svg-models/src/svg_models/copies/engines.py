"""Copies by the copy engines of a GPU, which leave its processors to others."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["Rectangle", "copy_by_engine", "rectangle"]

# Width in bytes, height, and the bytes from row to row of target and source.
Rectangle = tuple[int, int, int, int]

_ON_DEVICE = 2  # CU_MEMORYTYPE_DEVICE


class _Copy2D(ctypes.Structure):
    """`CUDA_MEMCPY2D` of the driver."""

    _fields_ = (
        ("src_x", ctypes.c_size_t),
        ("src_y", ctypes.c_size_t),
        ("src_type", ctypes.c_uint),
        ("src_host", ctypes.c_void_p),
        ("src_device", ctypes.c_void_p),
        ("src_array", ctypes.c_void_p),
        ("src_pitch", ctypes.c_size_t),
        ("dst_x", ctypes.c_size_t),
        ("dst_y", ctypes.c_size_t),
        ("dst_type", ctypes.c_uint),
        ("dst_host", ctypes.c_void_p),
        ("dst_device", ctypes.c_void_p),
        ("dst_array", ctypes.c_void_p),
        ("dst_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


def rectangle(target: Tensor, source: Tensor) -> Rectangle | None:
    """Return the rows of bytes that one item of a batch is; None if it is none such.

    It is where both tensors lie head by head, rows being heads, or token by token.

    Args:
        target: `[S, H, D]`.
        source: as `target`.
    """
    tokens, heads, width = target.shape
    size = target.element_size()
    pairs = [(x.stride(0), x.stride(1)) for x in (target, source)]
    if 0 in target.shape or target.stride(2) != 1 or source.stride(2) != 1:
        return None
    if all(of_token == width for of_token, _ in pairs):
        return tokens * width * size, heads, pairs[0][1] * size, pairs[1][1] * size
    if all(of_head == width for _, of_head in pairs):
        return heads * width * size, tokens, pairs[0][0] * size, pairs[1][0] * size
    return None


def copy_by_engine(target: Tensor, source: Tensor) -> bool:
    """Copy on the current stream by a copy engine; return whether one takes these tensors.

    None is asked while a graph is captured, since memory of another GPU is not known to be allowed
    in such a copy there.

    Args:
        target: `[B, S, H, D]`, of this GPU or of another one whose memory it can write.
        source: as `target`, of this GPU.
    """
    if torch.cuda.is_current_stream_capturing():
        return False
    if target.is_contiguous() and source.is_contiguous():
        target.copy_(source)
        return True
    rows = [row for row in map(rectangle, target, source) if row is not None]
    copy = _driver()
    if copy is None or len(rows) < len(target):
        return False
    stream = torch.cuda.current_stream(source.device).cuda_stream
    for y, x, (width, height, y_pitch, x_pitch) in zip(target, source, rows, strict=True):
        asked = _Copy2D(
            src_type=_ON_DEVICE, src_device=x.data_ptr(), src_pitch=x_pitch,
            dst_type=_ON_DEVICE, dst_device=y.data_ptr(), dst_pitch=y_pitch,
            width=width, height=height,
        )  # fmt: skip
        if copy(ctypes.byref(asked), stream) != 0:
            return False
    return True


@cache
def _driver() -> Any:
    """Return the driver's function; None if there is none."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuMemcpy2DAsync_v2
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function
