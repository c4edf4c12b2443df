"""Rotary position embedding, alone and fused with the norm of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from svg_kernels._backends import launchers, register, select
from svg_kernels._checks import check_companion, check_device, check_rows
from svg_kernels._tables import check_range, check_tables, pending, resolve

Pairing = Literal["interleaved", "half"]


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
    half = _is_half(pairing)
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


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    heads: int,
    eps: float = 1e-6,
    pairing: Pairing = "interleaved",
    start: int = 0,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys, rotate them, and lay them out head by head, in one pass.

    RMSNorm (over each head, or across all of them, as the length of the weight says), then `rope`,
    then `[B, S, H*D] -> [B, H, S, D]`, in fp32 and rounded once. One launch for both tensors.

    Args:
        query: `[B, S, H*D]` as the projection leaves it (a slice of a fused projection is fine).
        key: `[B, S, Hk*D]`; `Hk` may be smaller than H.
        query_weight: `[D]` to normalise per head, `[H*D]` across heads.
        key_weight: `[D]` or `[Hk*D]`, of the same kind.
        cos: table of the angles as for `rope`, or None to normalise and lay out only.
        sin: as `cos`.
        heads: number of query heads H.
        eps: added to the mean square, in the unit of `query^2`.
        pairing: which two channels rotate together.
        start: first token that is rotated; all tokens are normalised.
        out: `(query, key)` tensors `[B, H, S, D]` to write into, each with a contiguous last axis;
            slices along the tokens of a longer tensor save a concatenation with text tokens.
        backend: `"auto"`, `"cuda"`, `"triton"` or `"reference"`.

    Returns:
        `(query, key)`, each `[B, H, S, D]` in the dtype of its input. For inference only.

    Raises:
        TypeError: if a dtype is unsupported.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4, and Su et al. 2021, arXiv:2104.09864,
    eq. 34.
    """
    half = _is_half(pairing)
    compiled = launchers(backend, query)
    if compiled is not None and not pending(cos, sin):
        outs = _quick_outputs(query, key, heads) if out is None else out
        if outs is not None and compiled.qk_norm_rope(
            query, key, query_weight, key_weight, *outs, cos, sin, eps, half, start
        ):
            return outs
    dim = _check_projections(query, key, heads)
    _check_weights(query, key, query_weight, key_weight, dim)
    if cos is not None:
        check_range(start, check_tables(cos, sin, query, dim), query.shape[1])
        cos, sin = resolve(cos, sin)
    elif sin is not None:
        raise ValueError("sin was given without cos; pass both tables or neither")
    common = (query, key, query_weight, key_weight, cos, sin, heads, eps, half, start, backend)
    if out is None:
        q, k = _qk_norm_rope(*common)
        return q, k
    _check_out(query, out[0], dim)
    _check_out(key, out[1], dim)
    _qk_norm_rope_out(*common, *out)
    return out


def _is_half(pairing: str) -> bool:
    if pairing not in ("interleaved", "half"):
        raise ValueError(f"pairing must be 'interleaved' or 'half', got {pairing!r}")
    return pairing == "half"


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


def _check_projections(query: Tensor, key: Tensor, heads: int) -> int:
    check_rows("query", query)
    shape, key_shape = query.shape, key.shape
    if len(shape) != 3 or len(key_shape) != 3 or shape[:2] != key_shape[:2]:
        raise ValueError(
            "query and key must be [batch, tokens, heads * head_dim] with equal batch and tokens, "
            f"got {list(shape)} and {list(key_shape)}"
        )
    if heads < 1 or shape[2] % heads:
        raise ValueError(f"heads must divide {shape[2]}, got {heads}")
    dim = shape[2] // heads
    if dim == 0 or dim % 2 or key_shape[2] % dim:
        raise ValueError(
            f"head_dim must be even and divide the width of key {key_shape[2]}, got {dim}"
        )
    if query.dtype != key.dtype:
        raise TypeError(f"query and key must share a dtype, got {query.dtype} and {key.dtype}")
    check_device("key", key, query)
    return int(dim)


def _check_weights(query: Tensor, key: Tensor, wq: Tensor, wk: Tensor, dim: int) -> None:
    per_head = []
    for name, weight, x in (("query_weight", wq, query), ("key_weight", wk, key)):
        size, width = weight.shape, x.shape[2]
        if len(size) != 1 or size[0] not in (dim, width):
            raise ValueError(
                f"{name} must be [{dim}] (per head) or [{width}] (across heads), got {list(size)}"
            )
        check_companion(name, weight, query)
        if dim != width:
            per_head.append(size[0] == dim)
    if len(set(per_head)) > 1:
        raise ValueError("query_weight and key_weight must both be per head or both across heads")


def _check_out(x: Tensor, out: Tensor, dim: int) -> None:
    shape = (x.shape[0], x.shape[2] // dim, x.shape[1], dim)
    if tuple(out.shape) != shape or out.stride(-1) != 1:
        raise ValueError(
            f"out must be {list(shape)} with a contiguous last axis, got {list(out.shape)}"
        )
    if out.dtype != x.dtype or out.device != x.device:
        raise ValueError(f"out must be {x.dtype} on {x.device}, got {out.dtype} on {out.device}")


def _run_rope(
    xs: list[Tensor], cos: Tensor, sin: Tensor | None, half: bool, start: int, backend: str
) -> list[Tensor]:
    outs = [_empty_like(x) for x in xs]
    select(backend, xs[0].device).rope(xs, outs, cos, sin, half, start)
    return outs


def _fake_rope(
    xs: list[Tensor], cos: Tensor, sin: Tensor | None, half: bool, start: int, backend: str
) -> list[Tensor]:
    return [_empty_like(x) for x in xs]


def _run_rope_(
    xs: list[Tensor], cos: Tensor, sin: Tensor | None, half: bool, start: int, backend: str
) -> None:
    select(backend, xs[0].device).rope(xs, xs, cos, sin, half, start)


def _fake_rope_(
    xs: list[Tensor], cos: Tensor, sin: Tensor | None, half: bool, start: int, backend: str
) -> None:
    return None


def _outputs(query: Tensor, key: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, width = query.shape
    dim = width // heads
    shape = (batch, heads, tokens, dim)
    key_shape = (batch, key.shape[2] // dim, tokens, dim)
    dtype, device = query.dtype, query.device
    return (
        torch.empty(shape, dtype=dtype, device=device),
        torch.empty(key_shape, dtype=dtype, device=device),
    )


def _quick_outputs(query: Tensor, key: Tensor, heads: int) -> tuple[Tensor, Tensor] | None:
    """Return `_outputs` of arguments that nobody has checked yet, None if they cannot be right."""
    shape, key_shape = query.shape, key.shape
    if len(shape) != 3 or len(key_shape) != 3 or not 0 < heads <= shape[2]:
        return None
    batch, tokens, width = shape
    dim = width // heads
    # Sizes one by one: torch reads them twice as fast as a tuple.
    q = query.new_empty(batch, heads, tokens, dim)
    if key_shape == shape:
        return q, torch.empty_like(q)
    return q, key.new_empty(key_shape[0], key_shape[2] // dim, key_shape[1], dim)


def _run_qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
    half: bool,
    start: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    outs = _outputs(query, key, heads)
    select(backend, query.device).qk_norm_rope(
        (query, key), (query_weight, key_weight), outs, cos, sin, eps, half, start
    )
    return outs


def _fake_qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
    half: bool,
    start: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _outputs(query, key, heads)


def _run_qk_norm_rope_out(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
    half: bool,
    start: int,
    backend: str,
    query_out: Tensor,
    key_out: Tensor,
) -> None:
    select(backend, query.device).qk_norm_rope(
        (query, key),
        (query_weight, key_weight),
        (query_out, key_out),
        cos,
        sin,
        eps,
        half,
        start,
    )


def _fake_qk_norm_rope_out(*args: object) -> None:
    return None


_ROPE = "Tensor cos, Tensor? sin, bool half, int start, str backend)"
_QK = (
    "(Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor? cos, Tensor? sin,"
    " int heads, float eps, bool half, int start, str backend"
)
_rope = register("rope", f"(Tensor[] xs, {_ROPE} -> Tensor[]", _run_rope, _fake_rope)
_rope_ = register("rope_", f"(Tensor(a!)[] xs, {_ROPE} -> ()", _run_rope_, _fake_rope_)
_qk_norm_rope = register(
    "qk_norm_rope", f"{_QK}) -> (Tensor, Tensor)", _run_qk_norm_rope, _fake_qk_norm_rope
)
_qk_norm_rope_out = register(
    "qk_norm_rope_out",
    f"{_QK}, Tensor(a!) query_out, Tensor(b!) key_out) -> ()",
    _run_qk_norm_rope_out,
    _fake_qk_norm_rope_out,
)
