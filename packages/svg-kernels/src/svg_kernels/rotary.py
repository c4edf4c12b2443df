"""Rotary position embedding, alone and fused with the norm of queries and keys."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from svg_kernels._backends import check_companion, check_rows, register, select

Pairing = Literal["interleaved", "half"]


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor | None = None,
    *,
    pairing: Pairing = "interleaved",
    start: int = 0,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Rotate the pairs of each head by the angle of the token's position.

    `(a, b) -> (a cos - b sin, b cos + a sin)` in fp32, where the pair `(a, b)` is channels
    `(2i, 2i+1)` for `"interleaved"` and `(i, i + D/2)` for `"half"`. The tables cover the tokens
    `start .. start + length - 1`; the tokens before and after (text) are left alone.

    Args:
        x: `[B, H, S, D]`, fp16, bf16 or fp32, D even; strided views are read as they are.
        cos: `[length, D]` with each value given for both channels of its pair, or
            `[length, D/2]`; or, with `sin=None`, complex `[length, D/2]`. A leading axis of 1 or
            B and diffusers' `[1, length, 1, D]` are accepted too. Used in fp32.
        sin: as `cos`.
        pairing: which two channels rotate together.
        start: first token that is rotated.
        inplace: write into `x` and return it.
        backend: `"auto"`, `"cuda"`, `"triton"` or `"reference"`.

    Returns:
        `[B, H, S, D]`, contiguous unless `inplace`. For inference: no gradient flows through it.

    Raises:
        TypeError: if a dtype is unsupported.
        ValueError: if a shape does not fit, D is odd, or the devices differ.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34.
    """
    check_rows("x", x)
    if x.ndim != 4:
        raise ValueError(f"x must be [batch, heads, tokens, head_dim], got {list(x.shape)}")
    batch, _, tokens, dim = x.shape
    half = _is_half(pairing)
    cos, sin = tables(cos, sin, batch=batch, dim=dim, half=half)
    _check_range(cos, start, tokens)
    if cos.device != x.device:
        raise ValueError(f"cos must be on {x.device} like x, got {cos.device}")
    if inplace:
        _rope_(x, cos, sin, half, start, backend)
        return x
    y: Tensor = _rope(x, cos, sin, half, start, backend)
    return y


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
    dim = _check_projections(query, key, heads)
    _check_weights(query, key, query_weight, key_weight, dim)
    half = _is_half(pairing)
    if cos is not None:
        cos, sin = tables(cos, sin, batch=query.shape[0], dim=dim, half=half)
        _check_range(cos, start, query.shape[1])
        if cos.device != query.device:
            raise ValueError(f"cos must be on {query.device} like query, got {cos.device}")
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


def tables(
    cos: Tensor, sin: Tensor | None, *, batch: int, dim: int, half: bool
) -> tuple[Tensor, Tensor]:
    """Return both tables as fp32 views `[1 or B, length, D/2]`, one value per pair."""
    if sin is None:
        if not cos.is_complex():
            raise ValueError("sin may be left out only when cos is complex (cos + i sin)")
        if cos.shape[-1:] != (dim // 2,):
            raise ValueError(f"a complex table must be [length, {dim // 2}], got {list(cos.shape)}")
        pairs = torch.view_as_real(cos)
        cos, sin = pairs[..., 0], pairs[..., 1]
    elif cos.shape != sin.shape or cos.device != sin.device:
        raise ValueError(
            f"cos and sin must match, got {list(cos.shape)} on {cos.device} "
            f"and {list(sin.shape)} on {sin.device}"
        )
    return (
        _table("cos", cos, batch, dim, half, 0),
        _table("sin", sin, batch, dim, half, 1),
    )


def _table(name: str, table: Tensor, batch: int, dim: int, half: bool, offset: int) -> Tensor:
    out = table
    if out.ndim == 4 and 1 in out.shape[1:3]:
        out = out.squeeze(2) if out.shape[2] == 1 else out.squeeze(1)
    if out.ndim == 2:
        out = out[None]
    if out.ndim != 3 or out.shape[0] not in (1, batch) or out.shape[2] not in (dim, dim // 2):
        raise ValueError(
            f"{name} must be [length, {dim}] or [length, {dim // 2}], with a leading axis of 1 or "
            f"{batch} if any, got {list(table.shape)}"
        )
    if out.shape[2] == dim:
        out = out[..., : dim // 2] if half else out[..., offset::2]
    return out if out.dtype == torch.float32 else out.float()


def _is_half(pairing: str) -> bool:
    if pairing not in ("interleaved", "half"):
        raise ValueError(f"pairing must be 'interleaved' or 'half', got {pairing!r}")
    return pairing == "half"


def _check_range(cos: Tensor, start: int, tokens: int) -> None:
    if start < 0 or start + cos.shape[1] > tokens:
        raise ValueError(
            f"the tables cover tokens {start} to {start + cos.shape[1] - 1}, "
            f"but x has {tokens}; slice the tables or change start"
        )


def _check_projections(query: Tensor, key: Tensor, heads: int) -> int:
    check_rows("query", query)
    check_rows("key", key)
    check_companion("key", key, query)
    if query.ndim != 3 or key.ndim != 3 or query.shape[:2] != key.shape[:2]:
        raise ValueError(
            "query and key must be [batch, tokens, heads * head_dim] with equal batch and tokens, "
            f"got {list(query.shape)} and {list(key.shape)}"
        )
    if heads < 1 or query.shape[2] % heads:
        raise ValueError(f"heads must divide {query.shape[2]}, got {heads}")
    dim = query.shape[2] // heads
    if dim == 0 or dim % 2 or key.shape[2] % dim:
        raise ValueError(
            f"head_dim must be even and divide the width of key {key.shape[2]}, got {dim}"
        )
    if query.dtype != key.dtype:
        raise TypeError(f"query and key must share a dtype, got {query.dtype} and {key.dtype}")
    return dim


def _check_weights(query: Tensor, key: Tensor, wq: Tensor, wk: Tensor, dim: int) -> None:
    for name, weight, x in (("query_weight", wq, query), ("key_weight", wk, key)):
        if weight.ndim != 1 or weight.shape[0] not in (dim, x.shape[2]):
            raise ValueError(
                f"{name} must be [{dim}] (per head) or [{x.shape[2]}] (across heads), "
                f"got {list(weight.shape)}"
            )
        check_companion(name, weight, query)
    if (wq.shape[0] == dim) != (wk.shape[0] == dim) and query.shape[2] != dim != key.shape[2]:
        raise ValueError("query_weight and key_weight must both be per head or both across heads")


def _check_out(x: Tensor, out: Tensor, dim: int) -> None:
    shape = (x.shape[0], x.shape[2] // dim, x.shape[1], dim)
    if tuple(out.shape) != shape or out.stride(-1) != 1:
        raise ValueError(
            f"out must be {list(shape)} with a contiguous last axis, got {list(out.shape)}"
        )
    if out.dtype != x.dtype or out.device != x.device:
        raise ValueError(f"out must be {x.dtype} on {x.device}, got {out.dtype} on {out.device}")


def _run_rope(x: Tensor, cos: Tensor, sin: Tensor, half: bool, start: int, backend: str) -> Tensor:
    y: Tensor = select(backend, x.device).rope(x, cos, sin, half, start)
    return y


def _fake_rope(x: Tensor, cos: Tensor, sin: Tensor, half: bool, start: int, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _run_rope_(x: Tensor, cos: Tensor, sin: Tensor, half: bool, start: int, backend: str) -> None:
    select(backend, x.device).rope_(x, cos, sin, half, start)


def _fake_rope_(x: Tensor, cos: Tensor, sin: Tensor, half: bool, start: int, backend: str) -> None:
    return None


def _outputs(query: Tensor, key: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, width = query.shape
    dim = width // heads
    return (
        query.new_empty((batch, heads, tokens, dim)),
        key.new_empty((batch, key.shape[2] // dim, tokens, dim)),
    )


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


_ROPE = "Tensor cos, Tensor sin, bool half, int start, str backend)"
_QK = (
    "(Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor? cos, Tensor? sin,"
    " int heads, float eps, bool half, int start, str backend"
)
_rope = register("rope", f"(Tensor x, {_ROPE} -> Tensor", _run_rope, _fake_rope)
_rope_ = register("rope_", f"(Tensor(a!) x, {_ROPE} -> ()", _run_rope_, _fake_rope_)
_qk_norm_rope = register(
    "qk_norm_rope", f"{_QK}) -> (Tensor, Tensor)", _run_qk_norm_rope, _fake_qk_norm_rope
)
_qk_norm_rope_out = register(
    "qk_norm_rope_out",
    f"{_QK}, Tensor(a!) query_out, Tensor(b!) key_out) -> ()",
    _run_qk_norm_rope_out,
    _fake_qk_norm_rope_out,
)
