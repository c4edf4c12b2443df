"""Keys and values in e4m3, in the order that attention reads them in."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels import _debug, _dispatch
from svg_kernels._checks import FLOATS
from svg_kernels._dispatch import define_op, select_backend
from svg_kernels.key_value_fp8.rows import DTYPE, HEAD_DIM, Fp8KeyValue

__all__ = ["Fp8KeyValue", "quantize_key_value"]


def quantize_key_value(
    key: Tensor, value: Tensor, order: Tensor | None = None, *, backend: str = "auto"
) -> Fp8KeyValue:
    """Round the keys and values of each head to e4m3, permuted as `permute_rows` would.

    The mean of a head's rows is taken out of both first, and both are scaled by channel. Keys are
    then rotated, which spreads what channels still differ by over all of them. Attention puts all
    of it back exactly: the mean key moves all logits of a query alike, the mean value is added to
    the output, and queries are scaled and rotated to match the keys.

    Args:
        key: `[B, Hk, S, 128]`, fp16, bf16 or fp32; finite.
        value: as `key`.
        order: int32 `[B, Hk, T]` with values in `0 .. S-1` (not checked on a GPU), or a shape that
            expands to it; None keeps the order.
        backend: `"auto"`, `"triton"` or `"reference"`; there is no compiled one.

    Returns:
        `Fp8KeyValue` with T rows a head. For inference only. Never waits for the device.

    Raises:
        TypeError: if a dtype is unsupported.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: Zhang et al. 2024, arXiv:2411.10958 (means taken out, scales by channel); Shah et al.
    2024, arXiv:2407.08608, section 3.3 (rotation).
    """
    _check(key, value)
    if order is not None:
        order = _expanded(order, key)
    return Fp8KeyValue(**dict(zip(_NAMES, _quantize(key, value, order, backend), strict=True)))


def unsupported(name: str, device: torch.device) -> str | None:
    """Return in a sentence why the backend `name` cannot run on `device`, None if it can."""
    if name == "cuda":
        return "keys and values are quantised by Triton, there is no compiled kernel"
    if name == "triton" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            return f"e4m3 needs compute capability 8.9 or newer, this GPU has {major}.{minor}"
    return _dispatch.unsupported(name, device)


def _check(key: Tensor, value: Tensor) -> None:
    for name, x in (("key", key), ("value", value)):
        if x.ndim != 4 or x.shape[-1] != HEAD_DIM or x.shape[2] == 0:
            raise ValueError(
                f"{name} must be [batch, heads, tokens, {HEAD_DIM}] with at least one token, "
                f"got {list(x.shape)}"
            )
        if x.dtype not in FLOATS or x.dtype != key.dtype:
            raise TypeError(
                f"key and value must both be fp16, bf16 or fp32, got {key.dtype} and {value.dtype}"
            )
    if key.shape != value.shape or key.device != value.device:
        raise ValueError(
            "key and value must have one shape and device, got "
            f"{list(key.shape)} on {key.device} and {list(value.shape)} on {value.device}"
        )


def _expanded(order: Tensor, key: Tensor) -> Tensor:
    if order.dtype != torch.int32:
        raise TypeError(f"order must be int32, got {order.dtype}; use order.int()")
    if order.device != key.device:
        raise ValueError(f"order must be on {key.device} like the tensors, got {order.device}")
    heads = key.shape[:2]
    fits = all(size in (1, full) for size, full in zip(order.shape[:-1], heads, strict=False))
    if order.ndim != 3 or not fits:
        raise ValueError(f"order must expand to {[*heads, 'T']}, got {list(order.shape)}")
    return order.expand(*heads, order.shape[-1])


def _run(key: Tensor, value: Tensor, order: Tensor | None, backend: str) -> tuple[Tensor, ...]:
    module = select_backend(__name__, backend, key.device, unsupported=unsupported)
    if _debug.ENABLED and order is not None:
        _debug.check_order("order", order, key.shape[2], permutation=False)
    found: tuple[Tensor, ...] = module.quantize_key_value(key, value, order)
    return found


def _fake(key: Tensor, value: Tensor, order: Tensor | None, backend: str) -> tuple[Tensor, ...]:
    batch, heads, rows, width = key.shape
    shape = (batch, heads, rows if order is None else order.shape[-1], width)

    def fp32(*shape: int) -> Tensor:
        return key.new_empty(shape, dtype=torch.float32)

    channels = (batch, heads, width)
    return (
        key.new_empty(shape, dtype=DTYPE),
        key.new_empty(shape, dtype=DTYPE),
        *(fp32(*channels) for _ in range(4)),
    )


_NAMES = ("key", "value", "key_scale", "key_mean", "value_scale", "value_mean")
_quantize = define_op(
    "quantize_key_value",
    "(Tensor key, Tensor value, Tensor? order, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
