"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from svg_kernels._checks import check_device, check_rows
from svg_kernels._dispatch import define_op, launchers, select_backend
from svg_kernels.rope.tables import Pairing, check_range, check_tables, is_half, pending, resolve

__all__ = ["rope"]


@overload
def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor | None = None,
    *,
    pairing: Pairing = "interleaved",
    start: int = 0,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def rope(
    x: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor | None = None,
    *,
    pairing: Pairing = "interleaved",
    start: int = 0,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]: ...
def rope(
    x: Tensor | Sequence[Tensor],
    cos: Tensor,
    sin: Tensor | None = None,
    *,
    pairing: Pairing = "interleaved",
    start: int = 0,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Rotate the pairs of each head by the angle of the token's position, query and key at once.

    `(a, b) -> (a cos - b sin, b cos + a sin)` in fp32, where the pair `(a, b)` is channels
    `(2i, 2i+1)` for `"interleaved"` and `(i, i + D/2)` for `"half"`. The tables cover the tokens
    `start .. start + length - 1`; the tokens before and after (text) are left alone.

    Args:
        x: one `[B, H, S, D]` tensor or two (query, key), which one launch rotates; fp16, bf16 or
            fp32, D even. Two may differ in H and in strides alone. Strided views are read as they
            are.
        cos: `[length, D]` with each value given for both channels of its pair, or
            `[length, D/2]`; or, with `sin=None`, complex `[length, D/2]`. A leading axis of 1 or
            B and diffusers' `[1, length, 1, D]` are accepted too. Used in fp32.
        sin: as `cos`.
        pairing: which two channels rotate together.
        start: first token that is rotated.
        inplace: write into `x` and return it; two tensors must not overlap.
        backend: `"auto"`, `"cuda"`, `"triton"` or `"reference"`.

    Returns:
        `[B, H, S, D]`, contiguous unless `inplace`, or a tuple of them. For inference: no gradient
        flows through it.

    Raises:
        TypeError: if a dtype is unsupported or two differ.
        ValueError: if there are no or more than two tensors, a shape does not fit, D is odd, or
            the devices differ.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34.
    """
    half = is_half(pairing)
    query, key = (x, None) if isinstance(x, Tensor) else _one_or_two(x)
    compiled = launchers(backend, query)
    if compiled is not None and not pending(cos, sin):
        q = query if inplace else _empty_like(query)
        k = key if inplace or key is None else _empty_like(key)
        if compiled.rope(query, q, key, k, cos, sin, half, start):
            return q if query is x else (q,) if k is None else (q, k)
    xs = [query] if key is None else [query, key]
    dim = _check_heads(xs)
    check_range(start, check_tables(cos, sin, query, dim), query.shape[2])
    cos, sin = resolve(cos, sin)
    if inplace:
        _rope_(xs, cos, sin, half, start, backend)
    ys = xs if inplace else _rope(xs, cos, sin, half, start, backend)
    return ys[0] if query is x else tuple(ys)


def _one_or_two(xs: Sequence[Tensor]) -> tuple[Tensor, Any]:
    """Return both tensors, None for the second where there is one."""
    if len(xs) not in (1, 2):
        raise ValueError(
            f"x must be one tensor or two (query, key), got {len(xs)}; call once for every two"
        )
    return xs[0], xs[1] if len(xs) == 2 else None


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check_heads(xs: list[Tensor]) -> int:
    """Return head_dim of tensors `[B, H, S, D]`; raise unless H is all they differ in."""
    for x in xs:
        check_rows("x", x)
        if x.ndim != 4:
            raise ValueError(f"x must be [batch, heads, tokens, head_dim], got {list(x.shape)}")
    query, key = xs[0], xs[-1]
    batch, _, tokens, dim = query.shape
    if (key.shape[0], *key.shape[2:]) != (batch, tokens, dim):
        raise ValueError(
            "query and key must have equal batch, tokens and head_dim, "
            f"got {list(query.shape)} and {list(key.shape)}; rotate them by two calls"
        )
    if dim % 2:
        raise ValueError(f"head_dim must be even, got {dim}")
    if query.dtype != key.dtype:
        raise TypeError(f"query and key must share a dtype, got {query.dtype} and {key.dtype}")
    check_device("key", key, query)
    return dim


def _run_rope(
    xs: list[Tensor], cos: Tensor, sin: Tensor | None, half: bool, start: int, backend: str
) -> list[Tensor]:
    outs = [_empty_like(x) for x in xs]
    select_backend(__name__, backend, xs[0].device).rope(xs, outs, cos, sin, half, start)
    return outs


def _fake_rope(
    xs: list[Tensor], cos: Tensor, sin: Tensor | None, half: bool, start: int, backend: str
) -> list[Tensor]:
    return [_empty_like(x) for x in xs]


def _run_rope_(
    xs: list[Tensor], cos: Tensor, sin: Tensor | None, half: bool, start: int, backend: str
) -> None:
    select_backend(__name__, backend, xs[0].device).rope(xs, xs, cos, sin, half, start)


def _fake_rope_(
    xs: list[Tensor], cos: Tensor, sin: Tensor | None, half: bool, start: int, backend: str
) -> None:
    return None


_ARGUMENTS = "Tensor cos, Tensor? sin, bool half, int start, str backend)"
_rope = define_op("rope", f"(Tensor[] xs, {_ARGUMENTS} -> Tensor[]", _run_rope, _fake_rope)
_rope_ = define_op("rope_", f"(Tensor(a!)[] xs, {_ARGUMENTS} -> ()", _run_rope_, _fake_rope_)
