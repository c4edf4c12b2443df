"""Norm, rotation and layout of queries and keys by the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from svg_kernels import _library
from svg_kernels._rows import contiguous_rows
from svg_kernels.rope.tables import single


def qk_norm_rope(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    half: bool,
    start: int,
) -> None:
    """Launch `qk_norm_rope`; see `reference.qk_norm_rope`."""
    tables = (None, None) if cos is None else single(cos, sin)
    tensors = (*(contiguous_rows(t) for t in (*xs, *weights)), *outs)
    launch = _library.functions(xs[0].device).qk_norm_rope
    _library.require_launch(launch(*tensors, *tables, eps, half, start))
