"""What every operation asks of its arguments; no check makes a tensor or a view."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_tensor(name: str, x: object) -> None:
    """Raise TypeError unless `x` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(x).__name__}")


def check_rows(name: str, x: Tensor, out_dtype: torch.dtype | None = None) -> None:
    """Raise unless `x` has rows of a supported float type and `out_dtype` is one as well."""
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be fp16, bf16 or fp32, got {x.dtype}; convert it first")
    if x.ndim == 0:
        raise ValueError(f"{name} must have at least one axis, got a scalar; use {name}[None]")
    if out_dtype is not None and out_dtype not in FLOATS:
        raise TypeError(f"out_dtype must be fp16, bf16 or fp32, got {out_dtype}")


def check_vector(name: str, vector: Tensor | None, x: Tensor, like: str = "x") -> None:
    """Raise unless `vector` is None or one float per column of `x`, named `like`, on its device."""
    if vector is None:
        return
    check_tensor(name, vector)
    if vector.ndim != 1 or vector.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{name} must be [{x.shape[-1]}] to match the last axis of {like}, got "
            f"{list(vector.shape)}"
        )
    check_companion(name, vector, x, like)


def check_companion(name: str, other: Tensor, x: Tensor, like: str = "x") -> None:
    """Raise unless `other` is a supported float tensor on the device of `x`, named `like`."""
    if other.dtype not in FLOATS:
        raise TypeError(f"{name} must be fp16, bf16 or fp32, got {other.dtype}; convert it first")
    check_device(name, other, x, like)


def check_device(name: str, other: Tensor, x: Tensor, like: str = "x") -> None:
    """Raise unless `other` is on the device of `x`, named `like`."""
    if other.device != x.device:
        raise ValueError(
            f"{name} must be on {x.device} like {like}, got {other.device}; move it with "
            f".to({like}.device)"
        )


def check_modulation(name: str, value: Tensor, x: Tensor, like: str = "x") -> None:
    """Raise unless `value` is `[B, C]`, `[B or 1, S or 1, C]` for `x`, named `like`, `[B, S, C]`.

    `[B, C]` means one row per batch element, never one per token.
    """
    check_tensor(name, value)
    batch, tokens, width = x.shape
    shape = value.shape
    if not (
        len(shape) in (2, 3)
        and shape[-1] == width
        and shape[0] in (1, batch)
        and (len(shape) == 2 or shape[1] in (1, tokens))
    ):
        raise ValueError(
            f"{name} must be [{batch}, {width}], [{batch}, 1, {width}] or "
            f"[{batch}, {tokens}, {width}] for {like} {list(x.shape)}, got {list(shape)}"
        )
    check_companion(name, value, x, like)


def check_tokens(x: Tensor, name: str = "x") -> None:
    """Raise unless `x` is `[B, S, C]`."""
    if x.ndim != 3:
        raise ValueError(f"{name} must be [batch, tokens, width], got {list(x.shape)}")
