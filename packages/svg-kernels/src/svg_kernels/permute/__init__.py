"""Reorder the tokens of each head, and put them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from svg_kernels import _debug
from svg_kernels._checks import check_tensor
from svg_kernels._dispatch import define_op, launchers, select_backend
from svg_kernels.permute.cuda import MAX_TENSORS, UNUSED, as_bytes

__all__ = ["permute_rows", "unpermute_rows"]


@overload
def permute_rows(
    tensors: Tensor, order: Tensor | Sequence[Tensor], *, backend: str = "auto"
) -> Tensor: ...
@overload
def permute_rows(
    tensors: Sequence[Tensor], order: Tensor | Sequence[Tensor], *, backend: str = "auto"
) -> tuple[Tensor, ...]: ...
def permute_rows(
    tensors: Tensor | Sequence[Tensor],
    order: Tensor | Sequence[Tensor],
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Gather the rows of each head in the given order, several tensors in one launch.

    `out[b, h, i] = x[b, h, order[b, h, i]]`.

    Args:
        tensors: one `[B, H, S, D]` tensor or up to four (query, key, value, ...), of any dtype;
            strided views are read as they are.
        order: int32 `[B, H, T]` with values in `0 .. S-1` (not checked on a GPU), or a shape that
            expands to it; one for all tensors or one for each. T need not be S.
        backend: `"auto"`, `"cuda"`, `"triton"` or `"reference"`.

    Returns:
        One contiguous `[B, H, T, D]` tensor, or a tuple of them. For inference only.

    Raises:
        TypeError: if `order` is not int32.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: Yang et al. 2025, arXiv:2505.18875, section 3.2 (semantic-aware permutation).
    """
    return _permute(tensors, order, False, backend)


@overload
def unpermute_rows(
    tensors: Tensor, order: Tensor | Sequence[Tensor], *, backend: str = "auto"
) -> Tensor: ...
@overload
def unpermute_rows(
    tensors: Sequence[Tensor], order: Tensor | Sequence[Tensor], *, backend: str = "auto"
) -> tuple[Tensor, ...]: ...
def unpermute_rows(
    tensors: Tensor | Sequence[Tensor],
    order: Tensor | Sequence[Tensor],
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Scatter the rows of each head back to where `permute_rows` took them from.

    `out[b, h, order[b, h, i]] = x[b, h, i]`; no inverse order is formed.

    Args:
        tensors: one `[B, H, S, D]` tensor or up to four, of any dtype.
        order: int32 `[B, H, S]`, a permutation of `0 .. S-1` for each head (not checked), or a
            shape that expands to it; one for all tensors or one for each.
        backend: `"auto"`, `"cuda"`, `"triton"` or `"reference"`.

    Returns:
        One contiguous `[B, H, S, D]` tensor, or a tuple of them. For inference only.

    Raises:
        TypeError: if `order` is not int32.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: Yang et al. 2025, arXiv:2505.18875, section 3.2 (semantic-aware permutation).
    """
    return _permute(tensors, order, True, backend)


def _permute(
    tensors: Tensor | Sequence[Tensor],
    order: Tensor | Sequence[Tensor],
    inverse: bool,
    backend: str,
) -> Tensor | tuple[Tensor, ...]:
    xs = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    orders = [order] if isinstance(order, Tensor) else list(order)
    if len(orders) == 1:
        orders *= len(xs)
    if not 1 <= len(xs) <= MAX_TENSORS or len(orders) != len(xs):
        raise ValueError(
            f"expected 1 to {MAX_TENSORS} tensors and one order for all or one for each, "
            f"got {len(xs)} tensors and {len(orders)} orders"
        )
    compiled = launchers(backend, xs[0])
    outs = None if compiled is None else _quick(compiled, xs, orders, inverse)
    if outs is not None:
        return outs[0] if isinstance(tensors, Tensor) else tuple(outs)
    orders = [_check(x, index, inverse) for x, index in zip(xs, orders, strict=True)]
    outs = _permute_rows(xs, orders, inverse, backend)
    return outs[0] if isinstance(tensors, Tensor) else tuple(outs)


def _quick(
    compiled: Any, xs: list[Tensor], orders: list[Tensor], inverse: bool
) -> list[Tensor] | None:
    """Launch with arguments that nobody has checked yet; None if the launcher did not take them."""
    outs: list[Tensor] = []
    arguments: list[Tensor] = []
    for x, order in zip(xs, orders):  # noqa: B905 (as many, and this is the shortest way)
        shape, rows = x.shape, order.shape
        if len(shape) != 4 or not rows:
            return None
        # Sizes one by one: torch reads them twice as fast as a tuple.
        out = x.new_empty(shape[0], shape[1], rows[-1], shape[3])
        outs.append(out)
        arguments += as_bytes(x, order, out)
    return outs if compiled.permute_rows(inverse, *arguments, *UNUSED[len(xs)]) else None


def _check(x: Tensor, order: Tensor, inverse: bool) -> Tensor:
    check_tensor("tensors", x)
    check_tensor("order", order)
    if x.ndim != 4:
        raise ValueError(f"tensors must be [batch, heads, tokens, head_dim], got {list(x.shape)}")
    if order.dtype != torch.int32:
        raise TypeError(f"order must be int32, got {order.dtype}; use order.int()")
    if order.device != x.device:
        raise ValueError(f"order must be on {x.device} like the tensors, got {order.device}")
    heads = tuple(x.shape[:2])
    if tuple(order.shape[:-1]) != heads:
        if order.ndim not in (1, 2, 3) or any(
            size not in (1, full)
            for size, full in zip(reversed(order.shape[:-1]), reversed(heads), strict=False)
        ):
            raise ValueError(
                f"order must expand to {[*heads, 'T']} for a tensor {list(x.shape)}, "
                f"got {list(order.shape)}"
            )
        order = order.expand(*heads, order.shape[-1])
    if inverse and order.shape[-1] != x.shape[2]:
        raise ValueError(
            f"order must name each of the {x.shape[2]} rows once, got {order.shape[-1]} entries"
        )
    return order


def _outputs(xs: list[Tensor], orders: list[Tensor]) -> list[Tensor]:
    return [
        torch.empty((*order.shape, x.shape[3]), dtype=x.dtype, device=x.device)
        for x, order in zip(xs, orders, strict=True)
    ]


def _run(xs: list[Tensor], orders: list[Tensor], inverse: bool, backend: str) -> list[Tensor]:
    if _debug.ENABLED:
        for x, order in zip(xs, orders, strict=True):
            _debug.check_order("order", order, x.shape[2], permutation=inverse)
    outs = _outputs(xs, orders)
    select_backend(__name__, backend, xs[0].device).permute_rows(xs, orders, outs, inverse)
    return outs


def _fake(xs: list[Tensor], orders: list[Tensor], inverse: bool, backend: str) -> list[Tensor]:
    return _outputs(xs, orders)


_permute_rows = define_op(
    "permute_rows",
    "(Tensor[] xs, Tensor[] orders, bool inverse, str backend) -> Tensor[]",
    _run,
    _fake,
)
