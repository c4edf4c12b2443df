"""Copies of strided tensors, bit for bit, 16 bytes at a time where they lie so.

Of strided tensors torch computes the address of every element, which takes longer than to move its
two bytes.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

__all__ = ["copy_beside", "copy_bits", "packed", "picked"]


def copy_bits(target: Tensor, source: Tensor) -> None:
    """Copy into a tensor of the same shape and type.

    Args:
        target: what is written, of any strides.
        source: what is read, of any strides.
    """
    wide = _wide(target), _wide(source)
    if wide[0] is None or wide[1] is None:
        target.copy_(source)
    else:
        wide[0].copy_(wide[1])


def copy_beside(target: Tensor, source: Tensor, order: Tensor | None = None) -> None:
    """Copy heads, on a GPU by few of its processors: others compute meanwhile.

    Args:
        target: `[B, S, H, D]`, of this GPU or of another one, its last axis contiguous.
        source: as `target`; of any number of heads if they are chosen.
        order: int64 `[H]`, which heads of the source; None for all, in their order.
    """
    if source.is_cuda and _has_triton():
        from svg_models.parallel.triton import copy_rows

        copy_rows(target, source, order)
    else:
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


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _wide(x: Tensor) -> Tensor | None:
    """Return a tensor as elements of 16 bytes, a view, or None where it cannot be viewed so."""
    try:
        return x.view(torch.complex128)
    except RuntimeError:  # the width of a head, or where one begins, is no multiple of 16 bytes
        return None
