"""Launchers of the compiled kernels: allocate, describe the tensors, launch.

The functions mirror `reference.py`. What the vector kernels need (alignment, widths) is decided in
`csrc/`, which has a slower kernel for everything else, so nothing here is refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svg_kernels import _library
from svg_kernels._tables import describe

_lib = _library.functions()
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent without CUDA


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
    y = _new_like(x, out_dtype)
    if y.numel() == 0:
        return y
    x, outer, inner, x_outer, x_inner = _rows(x)
    # Copies must outlive the launch, so they keep a name until it returns.
    weight, bias, scale, shift = (_packed(t) for t in (weight, bias, scale, shift))
    device = x.device.index
    _lib.norm(
        x.data_ptr(),
        _CODES[x.dtype],
        x_outer,
        x_inner,
        y.data_ptr(),
        _CODES[out_dtype],
        *_vector(weight),
        *_vector(bias),
        *_modulation(scale),
        *_modulation(shift),
        outer,
        inner,
        x.shape[-1],
        eps,
        center,
        device,
        _stream(device),
    )
    return y


def gate_residual(residual: Tensor, x: Tensor, gate: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Launch `gate_residual`; see `reference.gate_residual`."""
    y = _new_like(residual, out_dtype)
    if y.numel() == 0:
        return y
    residual, x, packed = _last(residual), _last(x), _last(gate)
    device = residual.device.index
    _lib.gate_residual(
        residual.data_ptr(),
        _CODES[residual.dtype],
        residual.stride(0),
        residual.stride(1),
        x.data_ptr(),
        _CODES[x.dtype],
        x.stride(0),
        x.stride(1),
        *_modulation(packed),
        y.data_ptr(),
        _CODES[out_dtype],
        *residual.shape,
        device,
        _stream(device),
    )
    return y


def rope(x: Tensor, cos: Tensor, sin: Tensor | None, half: bool, start: int) -> Tensor:
    """Launch `rope` into a new tensor; see `reference.rope`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rope(_last(x), y, cos, sin, half, start)
    return y


def rope_(x: Tensor, cos: Tensor, sin: Tensor | None, half: bool, start: int) -> None:
    """Launch `rope` in place; see `reference.rope_`."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        _rope(x, x, cos, sin, half, start)
    else:
        x.copy_(rope(x, cos, sin, half, start))


def _rope(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor | None, half: bool, start: int) -> None:
    if x.numel() == 0:
        return
    batch, heads, tokens, dim = x.shape
    _kept, table = describe(cos, sin, dim, half, start)
    device = x.device.index
    _lib.rope(
        x.data_ptr(),
        *x.stride()[:3],
        y.data_ptr(),
        *y.stride()[:3],
        _CODES[x.dtype],
        batch,
        heads,
        tokens,
        dim,
        half,
        *table,
        device,
        _stream(device),
    )


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
    xs = [_last(x) for x in xs]
    weights = [_last(weight) for weight in weights]
    batch, _, tokens, dim = outs[0].shape
    if outs[0].numel() == 0:
        return
    table: Sequence[int] = (0, 0, 0, 0, 0, 0, 0)
    if cos is not None:
        _kept, table = describe(cos, sin, dim, half, start)
    described = array("q")
    for x, weight, out in zip(xs, weights, outs, strict=True):
        described.extend((x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.stride()[:2]))
        described.extend((*out.stride()[:3], out.shape[1], _CODES[weight.dtype]))
        described.append(weight.numel() != dim or out.shape[1] == 1)
    device = xs[0].device.index
    _lib.qk_norm_rope(
        described.buffer_info()[0],
        _CODES[xs[0].dtype],
        batch,
        tokens,
        dim,
        eps,
        half,
        *table,
        device,
        _stream(device),
    )


def permute_rows(
    xs: Sequence[Tensor], orders: Sequence[Tensor], outs: Sequence[Tensor], inverse: bool
) -> None:
    """Launch `permute_rows`, one launch for tensors of one batch and head count.

    See `reference.permute_rows`.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i, out in enumerate(outs):
        groups.setdefault((out.shape[0], out.shape[1]), []).append(i)
    for (batch, heads), members in groups.items():
        described = array("q")
        kept = []
        for i in members:
            x, order, out = _last(xs[i]), _last(orders[i]), outs[i]
            kept += [x, order]
            size = x.element_size()
            described.extend((x.data_ptr(), out.data_ptr(), order.data_ptr()))
            described.extend(stride * size for stride in x.stride()[:3])
            described.extend((order.stride(0), order.stride(1)))
            described.extend((x.shape[2], out.shape[2], x.shape[3] * size))
        device = kept[0].device.index
        _lib.permute_rows(
            described.buffer_info()[0],
            len(members),
            batch,
            heads,
            inverse,
            device,
            _stream(device),
        )


def _rows(x: Tensor) -> tuple[Tensor, int, int, int, int]:
    """Return `x` and its rows as `[outer, inner]` with strides, copied if two axes do not do."""
    width = x.shape[-1]
    if x.ndim == 3 and (x.stride(2) == 1 or width == 1):
        return x, x.shape[0], x.shape[1], x.stride(0), x.stride(1)
    if x.ndim == 2 and (x.stride(1) == 1 or width == 1):
        return x, 1, x.shape[0], 0, x.stride(0)
    x = x.contiguous()
    return x, 1, x.numel() // width, 0, width


def _new_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == x.dtype and x.is_contiguous():
        return torch.empty_like(x)  # the quicker call
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else _last(x)


def _vector(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), _CODES[x.dtype])


def _modulation(x: Tensor | None) -> tuple[int, int, int, int]:
    """Return pointer, dtype and strides along B and S, 0 along an axis of length 1."""
    if x is None:
        return 0, 0, 0, 0
    shape, stride = x.shape, x.stride()
    per_token = len(shape) == 3 and shape[1] > 1
    return (
        x.data_ptr(),
        _CODES[x.dtype],
        stride[0] if shape[0] > 1 else 0,
        stride[1] if per_token else 0,
    )
