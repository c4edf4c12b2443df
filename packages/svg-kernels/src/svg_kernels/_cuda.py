"""Launchers of the compiled kernels for arguments that need a conversion first.

The functions mirror `reference.py`. The library checks what it is given (in `csrc/ops`) and
has a slower kernel for what vectors cannot serve (alignment, widths); what is left to do here is a
last axis that is contiguous, tables in fp32 and rows that two strides describe.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svg_kernels import _library
from svg_kernels._tables import single
from svg_kernels.permute import UNUSED, as_bytes


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Launch `norm` without centring; see `reference.rms_norm`."""
    return _norm(x, weight, None, None, None, eps, out_dtype, False)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """Launch `norm` with centring; see `reference.layer_norm`."""
    return _norm(x, weight, bias, None, None, eps, out_dtype, True)


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch `norm` with centring and modulation; see `reference.layer_norm_modulate`."""
    return _norm(x, weight, bias, scale, shift, eps, out_dtype, True)


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    center: bool,
) -> Tensor:
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    rest = (*(t if t is None else _last(t) for t in (weight, bias, scale, shift)), y, eps, center)
    if not _library.functions().norm(_last(x), *rest):
        _launched(_library.functions().norm(x.contiguous(), *rest))
    return y


def gate_residual(residual: Tensor, x: Tensor, gate: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Launch `gate_residual`; see `reference.gate_residual`."""
    y = torch.empty(residual.shape, dtype=out_dtype, device=residual.device)
    _launched(_library.functions().gate_residual(_last(residual), _last(x), _last(gate), y))
    return y


def rope(
    xs: Sequence[Tensor],
    outs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor | None,
    half: bool,
    start: int,
) -> None:
    """Launch `rope`, one launch for both tensors; see `reference.rope`."""
    rows = [_last(x) for x in xs]
    ys = [row if out is x else out for x, row, out in zip(xs, rows, outs, strict=True)]
    second = (None, None) if len(xs) == 1 else (rows[1], ys[1])
    _launched(_library.functions().rope(rows[0], ys[0], *second, *single(cos, sin), half, start))
    for y, out in zip(ys, outs, strict=True):
        if y is not out:
            out.copy_(y)


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
    tensors = (*(_last(t) for t in (*xs, *weights)), *outs)
    _launched(_library.functions().qk_norm_rope(*tensors, *tables, eps, half, start))


def permute_rows(
    xs: Sequence[Tensor], orders: Sequence[Tensor], outs: Sequence[Tensor], inverse: bool
) -> None:
    """Launch `permute_rows`, one launch for tensors of one batch and head count.

    See `reference.permute_rows`.
    """
    arguments: list[Tensor] = []
    for x, order, out in zip(xs, orders, outs, strict=True):
        arguments += as_bytes(_last(x), _last(order), out)
    _launched(_library.functions().permute_rows(inverse, *arguments, *UNUSED[len(xs)]))


def _last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _launched(launched: bool) -> None:
    if not launched:
        raise RuntimeError(
            "the compiled kernels did not take arguments that had passed every check; please "
            "report their shapes, strides and dtypes, and use backend='triton' meanwhile"
        )
