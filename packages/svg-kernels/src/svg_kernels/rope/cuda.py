"""Rotary embedding by the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from svg_kernels import _library
from svg_kernels._rows import contiguous_rows
from svg_kernels.rope.tables import single


def rope(
    xs: Sequence[Tensor],
    outs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor | None,
    half: bool,
    start: int,
) -> None:
    """Launch `rope`, one launch for both tensors; see `reference.rope`."""
    rows = [contiguous_rows(x) for x in xs]
    ys = [row if out is x else out for x, row, out in zip(xs, rows, outs, strict=True)]
    second = (None, None) if len(xs) == 1 else (rows[1], ys[1])
    launch = _library.functions(xs[0].device).rope
    _library.require_launch(launch(rows[0], ys[0], *second, *single(cos, sin), half, start))
    for y, out in zip(ys, outs, strict=True):
        if y is not out:
            out.copy_(y)
