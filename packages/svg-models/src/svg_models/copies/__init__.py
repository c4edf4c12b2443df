"""Copies of strided tensors, bit for bit, 16 bytes at a time where they lie so.

Of strided tensors torch computes the address of every element, which takes longer than to move its
two bytes.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from svg_models.copies.engines import copy_by_engine

__all__ = ["copy_beside", "copy_bits", "packed", "picked"]


# Programs of a copy that has the GPU for itself, and of one beside other work. Two H200s, torch
# 2.11, 2026-11-28, 194 MB to the other one and as much that stays: 64 of them write 306 GB/s, 264
# write 331, 16 write 172. Beside matrix products three such copies cost 1.35 ms by 64, 1.7 by 32,
# 2.1 by 264, and 2.0 by torch's own kernel. An engine moves contiguous memory at 387 GB/s.
ALL, FEW = 1056, 64


def copy_bits(target: Tensor, source: Tensor) -> None:
    """Copy into a tensor of the same shape and type.

    Args:
        target: `[B, S, H, D]`, what is written, of any strides.
        source: what is read, of any strides.
    """
    whole = target.is_contiguous() and source.is_contiguous()
    if target.is_cuda and not whole and _copy_rows(target, source, None, ALL):
        return
    wide = _wide(target), _wide(source)
    if wide[0] is None or wide[1] is None:
        target.copy_(source)
    else:
        wide[0].copy_(wide[1])


def copy_beside(target: Tensor, source: Tensor, order: Tensor | None = None) -> None:
    """Copy heads while others compute: on a GPU by an engine, or by few of its processors.

    Args:
        target: `[B, S, H, D]`, of this GPU or of another one.
        source: as `target`, of this GPU; of any number of heads if they are chosen.
        order: int64 `[H]`, which heads of the source; None for all, in their order.
    """
    if target.is_cuda:
        if order is None and copy_by_engine(target, source):
            return
        if _copy_rows(target, source, order, FEW):
            return
    copy_bits(target, source if order is None else picked(source, 2, order))


def packed(x: Tensor) -> Tensor:
    """Return a tensor that is contiguous: itself, or a copy."""
    if x.is_contiguous():
        return x
    parcel = x.new_empty(x.shape)
    copy_bits(parcel, x)
    return parcel


def picked(x: Tensor, axis: int, places: Tensor) -> Tensor:
    """Return entries of an axis before the last, in a tensor of their own."""
    wide = _wide(x)
    if wide is None:
        return x.index_select(axis, places)
    return wide.index_select(axis, places).view(x.dtype)


def _copy_rows(target: Tensor, source: Tensor, order: Tensor | None, programs: int) -> bool:
    """Copy by our own kernel; return whether it takes these tensors."""
    if not _has_triton() or target.ndim != 4 or target.stride(3) != 1 or source.stride(3) != 1:
        return False
    from svg_models.copies.triton import copy_rows

    copy_rows(target, source, order, programs)
    return True


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _wide(x: Tensor) -> Tensor | None:
    """Return a tensor as elements of 16 bytes, a view, or None where it cannot be viewed so."""
    try:
        return x.view(torch.complex128)
    except RuntimeError:  # the width of a head, or where one begins, is no multiple of 16 bytes
        return None
