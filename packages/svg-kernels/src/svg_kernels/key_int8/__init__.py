"""Keys in 8-bit integers, in the order that attention reads them in."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels import _debug
from svg_kernels._checks import FLOATS, expanded_order
from svg_kernels._dispatch import define_op, select_backend
from svg_kernels._dispatch import unsupported as _unsupported
from svg_kernels.key_int8.rows import Int8Key
from svg_kernels.rotation import HEAD_DIM

__all__ = ["Int8Key", "quantize_key"]


def quantize_key(key: Tensor, order: Tensor | None = None, *, backend: str = "auto") -> Int8Key:
    """Round the keys of each head to 8-bit integers, permuted as `permute_rows` would.

    The mean of a head's keys is taken out first, channels far larger than the others are scaled
    down, and rows are rotated, which spreads what channels still differ by over all of them. Each
    row is then divided by its largest element. Attention puts all of it back exactly: the mean key
    moves all logits of a query alike, and queries are scaled and rotated to match the keys.

    Args:
        key: `[B, Hk, S, 128]`, fp16, bf16 or fp32. A row that is not finite gets a scale of NaN,
            and so spoils the queries that read it, no others.
        order: int32 `[B, Hk, T]` with values in `0 .. S-1` (not checked on a GPU), or a shape that
            expands to it; None keeps the order.
        backend: `"auto"`, `"triton"` or `"reference"`; there is no compiled one.

    Returns:
        `Int8Key` with T rows a head. For inference only. Never waits for the device.

    Raises:
        TypeError: if a dtype is unsupported.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: Zhang et al. 2024, arXiv:2411.10958 (integers, means taken out); Ashkboos et al. 2024,
    arXiv:2404.00456 (rotation).
    """
    if key.ndim != 4 or key.shape[-1] != HEAD_DIM or key.shape[2] == 0:
        raise ValueError(
            f"key must be [batch, heads, tokens, {HEAD_DIM}] with at least one token, "
            f"got {list(key.shape)}"
        )
    if key.dtype not in FLOATS:
        raise TypeError(f"key must be fp16, bf16 or fp32, got {key.dtype}")
    if order is not None:
        order = expanded_order(order, key)
    return Int8Key(**dict(zip(_NAMES, _quantize(key, order, backend), strict=True)))


def unsupported(name: str, device: torch.device) -> str | None:
    """Return in a sentence why the backend `name` cannot run on `device`, None if it can."""
    if name == "cuda":
        return "keys are quantised by Triton, there is no compiled kernel"
    return _unsupported(name, device)


def _run(key: Tensor, order: Tensor | None, backend: str) -> tuple[Tensor, ...]:
    module = select_backend(__name__, backend, key.device, unsupported=unsupported)
    if _debug.ENABLED and order is not None:
        _debug.check_order("order", order, key.shape[2], permutation=False)
    found: tuple[Tensor, ...] = module.quantize_key(key, order)
    return found


def _fake(key: Tensor, order: Tensor | None, backend: str) -> tuple[Tensor, ...]:
    batch, heads, rows, width = key.shape
    rows = rows if order is None else order.shape[-1]

    def fp32(*shape: int) -> Tensor:
        return key.new_empty((batch, heads, *shape), dtype=torch.float32)

    integers = key.new_empty((batch, heads, rows, width), dtype=torch.int8)
    return integers, fp32(rows), fp32(width), fp32(width)


_NAMES = ("key", "row_scale", "channel_scale", "mean")
_quantize = define_op(
    "quantize_key",
    "(Tensor key, Tensor? order, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
