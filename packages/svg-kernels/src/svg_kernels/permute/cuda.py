"""The permutation of rows by the compiled kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svg_kernels import _library
from svg_kernels._rows import contiguous_rows

MAX_TENSORS = 4
UNUSED = [(None,) * (3 * (MAX_TENSORS - count)) for count in range(MAX_TENSORS + 1)]
"""What the launcher takes in the place of tensors, orders and outputs beyond a count."""


def permute_rows(
    xs: Sequence[Tensor], orders: Sequence[Tensor], outs: Sequence[Tensor], inverse: bool
) -> None:
    """Launch `permute_rows`, one launch for tensors of one batch and head count.

    See `reference.permute_rows`.
    """
    arguments: list[Tensor] = []
    for x, order, out in zip(xs, orders, outs, strict=True):
        arguments += as_bytes(contiguous_rows(x), contiguous_rows(order), out)
    launch = _library.functions(xs[0].device).permute_rows
    _library.require_launch(launch(inverse, *arguments, *UNUSED[len(xs)]))


def as_bytes(x: Tensor, order: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the launcher takes for them: bytes as such.

    Not every torch can hand over its 8-bit floats.
    """
    if x.element_size() == 1:
        x, out = x.view(torch.uint8), out.view(torch.uint8)
    return x, order, out
