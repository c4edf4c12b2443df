"""RMSNorm, rotation and head-major layout of queries and keys, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels._checks import check_companion, check_device, check_rows, check_tensor
from svg_kernels._dispatch import define_op, launchers, select_backend
from svg_kernels.rope.tables import Pairing, check_range, check_tables, is_half, pending, resolve

__all__ = ["qk_norm_rope"]


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
    """Normalize queries and keys, rotate them, and lay them out head by head, in one pass.

    RMSNorm (over each head, or across all of them, as the length of the weight says), then `rope`,
    then `[B, S, H*D] -> [B, H, S, D]`, in fp32 and rounded once. One launch for both tensors.

    Args:
        query: `[B, S, H*D]` as the projection leaves it (a slice of a fused projection is fine).
        key: `[B, S, Hk*D]`; `Hk` may be smaller than H.
        query_weight: `[D]` to normalize per head, `[H*D]` across heads.
        key_weight: `[D]` or `[Hk*D]`, of the same kind.
        cos: table of the angles as for `rope`, or None to normalize and lay out only.
        sin: as `cos`.
        heads: number of query heads H.
        eps: added to the mean square, in the unit of `query^2`.
        pairing: which two channels rotate together.
        start: first token that is rotated; all tokens are normalized.
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
    half = is_half(pairing)
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


def _check_projections(query: Tensor, key: Tensor, heads: int) -> int:
    check_rows("query", query)
    check_tensor("key", key)
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
        check_tensor(name, weight)
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
    select_backend(__name__, backend, query.device).qk_norm_rope(
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
    select_backend(__name__, backend, query.device).qk_norm_rope(
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


_ARGUMENTS = (
    "(Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor? cos, Tensor? sin,"
    " int heads, float eps, bool half, int start, str backend"
)
_qk_norm_rope = define_op(
    "qk_norm_rope", f"{_ARGUMENTS}) -> (Tensor, Tensor)", _run_qk_norm_rope, _fake_qk_norm_rope
)
_qk_norm_rope_out = define_op(
    "qk_norm_rope_out",
    f"{_ARGUMENTS}, Tensor(a!) query_out, Tensor(b!) key_out) -> ()",
    _run_qk_norm_rope_out,
    _fake_qk_norm_rope_out,
)
