"""Which tier runs an operation: `cuda`, `triton` or `reference`, chosen once per device.

A tier is a module with one function per operation (`reference.py` shows them all). `auto` takes the
first of `ORDER` that can run; a tier asked for by name runs or raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svg_kernels import _library
from svg_kernels.errors import UnsupportedError

ORDER = ("cuda", "triton", "reference")
_MODULES = {
    "cuda": "svg_kernels._cuda",
    "triton": "svg_kernels._triton",
    "reference": "svg_kernels.reference",
}
_chosen: dict[tuple[str, torch.device], Any] = {}


@dataclass(frozen=True, kw_only=True)
class Tier:
    """One backend on one device: whether it can run, and why or why not in a sentence."""

    name: str
    available: bool
    note: str


def select(backend: str, device: torch.device) -> Any:
    """Return the module that serves `backend` on `device`, or raise UnsupportedError."""
    module = _chosen.get((backend, device))
    if module is None:
        module = _chosen[backend, device] = _choose(backend, device)
    return module


def _choose(backend: str, device: torch.device) -> Any:
    if backend == "auto":
        name = auto(device)
    else:
        if backend not in ORDER:
            raise ValueError(f"backend must be 'auto' or one of {ORDER}, got {backend!r}")
        tier = probe(backend, device)
        if not tier.available:
            notes = {t.name: ("can run; " if t.available else "") + t.note for t in _tiers(device)}
            raise UnsupportedError(f"svg_kernels backend {backend!r} on {device}", notes)
        name = backend
    return importlib.import_module(_MODULES[name])


def auto(device: torch.device) -> str:
    """Return the first tier of `ORDER` that can run; the interpreter is never taken unasked."""
    for name in ORDER[:-1]:
        if device.type != "cpu" and probe(name, device).available:
            return name
    return ORDER[-1]


def _tiers(device: torch.device) -> tuple[Tier, ...]:
    return tuple(probe(name, device) for name in ORDER)


def probe(name: str, device: torch.device) -> Tier:
    """Say whether the tier `name` can run on `device`; may build the library at first use."""
    if name == "reference":
        return Tier(name=name, available=True, note="plain torch runs on any device")
    reason = _no_cuda_device(device)
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return Tier(name=name, available=False, note="triton is not installed")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            # Correct but slow, so only on request.
            return Tier(name=name, available=True, note="interpreted on the CPU, for tests")
        return Tier(name=name, available=not reason, note=reason or "compiled at first use")
    if not reason:
        reason = _library.why_not(device)
    return Tier(name=name, available=not reason, note=reason or str(_library.path()))


def _no_cuda_device(device: torch.device) -> str:
    if device.type != "cuda":
        return f"needs tensors on a CUDA device, these are on {device.type!r}"
    if torch.version.cuda is None:
        return "this torch was not built for CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return ""


def register(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Register `svg_kernels::name` with torch and return the callable operator.

    `define` + `impl` costs a third of what `custom_op` adds to every call.
    """
    qualified = f"svg_kernels::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "default", run)
    torch.library.register_fake(qualified, fake)
    overload: Callable[..., Any] = getattr(torch.ops.svg_kernels, name).default
    return overload


FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_rows(name: str, x: Tensor, out_dtype: torch.dtype | None = None) -> None:
    """Raise unless `x` has rows of a supported float type and `out_dtype` is one as well."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be fp16, bf16 or fp32, got {x.dtype}; convert it first")
    if x.ndim == 0:
        raise ValueError(f"{name} must have at least one axis, got a scalar; use {name}[None]")
    if out_dtype is not None and out_dtype not in FLOATS:
        raise TypeError(f"out_dtype must be fp16, bf16 or fp32, got {out_dtype}")


def check_vector(name: str, vector: Tensor | None, x: Tensor) -> None:
    """Raise unless `vector` is None or one float per column of `x`, on its device."""
    if vector is None:
        return
    if vector.ndim != 1 or vector.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{name} must be [{x.shape[-1]}] to match the last axis of x, got {list(vector.shape)}"
        )
    check_companion(name, vector, x)


def check_companion(name: str, other: Tensor, x: Tensor) -> None:
    """Raise unless `other` is a supported float tensor on the device of `x`."""
    if other.dtype not in FLOATS:
        raise TypeError(f"{name} must be fp16, bf16 or fp32, got {other.dtype}")
    if other.device != x.device:
        raise ValueError(
            f"{name} must be on {x.device} like x, got {other.device}; move it with .to(x.device)"
        )


def as_modulation(name: str, value: Tensor, x: Tensor) -> Tensor:
    """Return `value` as `[B or 1, S or 1, C]` for `x` of shape `[B, S, C]`.

    `[B, C]` means one row per batch element, never one per token.
    """
    batch, tokens, width = x.shape
    out = value[:, None] if value.ndim == 2 else value
    if out.ndim != 3 or not (
        out.shape[0] in (1, batch) and out.shape[1] in (1, tokens) and out.shape[2] == width
    ):
        raise ValueError(
            f"{name} must be [{batch}, {width}], [{batch}, 1, {width}] or "
            f"[{batch}, {tokens}, {width}] for x {list(x.shape)}, got {list(value.shape)}"
        )
    check_companion(name, value, x)
    return out


def check_tokens(x: Tensor) -> None:
    """Raise unless `x` is `[B, S, C]`."""
    if x.ndim != 3:
        raise ValueError(f"x must be [batch, tokens, width], got {list(x.shape)}")


def as_list(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return one tensor or a sequence of them as a list."""
    return [value] if isinstance(value, Tensor) else list(value)
