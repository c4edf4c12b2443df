"""Every operation in plain torch: any device, easy to read, the oracle of the tests.

Arithmetic is in fp32 (fp64 where the input is fp64) and is rounded once, at the end. The functions
here take exactly what the compiled launchers take; arguments were checked before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svg_kernels._tables import pair_views


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Scale rows to unit root mean square, then by `weight`."""
    y = _wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return _finish(y if weight is None else y * _like(weight, y), out_dtype)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """Shift rows to mean 0 and scale them to variance 1, then apply `weight` and `bias`."""
    return _finish(_layer_norm(_wide(x), weight, bias, eps), out_dtype)


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Layer norm, then `* (1 + scale) + shift`."""
    y = _layer_norm(_wide(x), weight, bias, eps)
    return _finish(y * (1 + _per_token(scale, y)) + _per_token(shift, y), out_dtype)


def gate_residual(residual: Tensor, x: Tensor, gate: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Add `x * gate` to `residual`."""
    base = _wide(residual)
    return _finish(base + _like(x, base) * _per_token(gate, base), out_dtype)


def rope(
    xs: Sequence[Tensor],
    outs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor | None,
    half: bool,
    start: int,
) -> None:
    """Rotate the tokens from `start` on that the tables cover, from `[B, H, S, D]` to `outs`.

    An output may be its own input.
    """
    c, s = pair_views(cos, sin, xs[0].shape[3], half)
    for x, out in zip(xs, outs, strict=True):
        if out is not x:
            out.copy_(x)
        rows = out[:, :, start : start + c.shape[1]]
        rows.copy_(_rotate(_wide(rows), c, s, half))


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
    """Normalise `[B, S, H*D]`, rotate, and write to `outs` of shape `[B, H, S, D]`."""
    for x, weight, out in zip(xs, weights, outs, strict=True):
        heads, dim = out.shape[1], out.shape[3]
        y = _wide(x)
        if weight.numel() == dim:
            y = y.unflatten(-1, (heads, dim))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * _like(weight, y)
        y = y.reshape(x.shape[0], x.shape[1], heads, dim).transpose(1, 2)
        if cos is not None:
            c, s = pair_views(cos, sin, dim, half)
            stop = start + c.shape[1]
            turned = _rotate(y[:, :, start:stop], c, s, half)
            y = torch.cat((y[:, :, :start], turned, y[:, :, stop:]), dim=2)
        out.copy_(y)


def permute_rows(
    xs: Sequence[Tensor], orders: Sequence[Tensor], outs: Sequence[Tensor], inverse: bool
) -> None:
    """Gather rows of `[B, H, S, D]` by `orders`, or scatter them back."""
    for x, order, out in zip(xs, orders, outs, strict=True):
        index = order.long()[..., None].expand(*order.shape, x.shape[-1])
        if inverse:
            out.scatter_(2, index, x)
        else:
            out.copy_(x.gather(2, index))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """Rotate the pairs of the last axis; `cos` and `sin` are `[1 or B, S, D/2]`."""
    c, s = _like(cos, x)[:, None], _like(sin, x)[:, None]
    a, b = x.chunk(2, dim=-1) if half else (x[..., 0::2], x[..., 1::2])
    first, second = a * c - b * s, b * c + a * s
    if half:
        return torch.cat((first, second), dim=-1)
    return torch.stack((first, second), dim=-1).flatten(-2)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)  # what rounding left of a large mean
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * _like(weight, y)
    return y if bias is None else y + _like(bias, y)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _like(x: Tensor, other: Tensor) -> Tensor:
    return x.to(other.dtype)


def _per_token(x: Tensor, other: Tensor) -> Tensor:
    return _like(x[:, None] if x.ndim == 2 else x, other)


def _finish(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()
