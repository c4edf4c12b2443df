"""Which tier runs an operation: `cuda`, `triton` or `reference`, chosen once per device.

A tier is a module with one function per operation (`reference.py` shows them all). `auto` takes the
first of `ORDER` that can run; a tier asked for by name runs or raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from svg_kernels import _library
from svg_kernels.errors import UnsupportedError

ORDER = ("cuda", "triton", "reference")
_MODULES = {
    "cuda": "svg_kernels._cuda",
    "triton": "svg_kernels._triton",
    "reference": "svg_kernels.reference",
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_chosen: dict[tuple[str, torch.device], Any] = {}
_launchers: dict[tuple[str, torch.device], Any] = {}  # of devices that the compiled tier serves


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
    if name == "cuda":
        _launchers[backend, device] = _library.functions()
    return importlib.import_module(_MODULES[name])


def launchers(backend: str, x: Any) -> Any | None:
    """Return the compiled launchers if a call on `x` can go straight to them, else None.

    It can where nobody listens to torch's dispatcher (plain tensors, no gradients, nothing
    compiling or tracing) and an earlier call has chosen the compiled tier for this device. The
    launchers check their arguments and return whether they launched; the operations check in words,
    convert and go through the dispatcher only where that fails. This saves 10 us of a call or more.
    """
    if (
        type(x) is not Tensor
        or is_grad_enabled()
        or is_dynamo_compiling()
        or is_in_torch_dispatch_mode()
    ):
        return None
    return _launchers.get((backend, x.device))


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
    """Register `svg_kernels::name` with torch; return a function that calls it.

    `define` + `impl` costs a third of what `custom_op` adds to every call. Where nobody listens
    to torch's dispatcher (as in `launchers`) the function skips it as well.
    """
    qualified = f"svg_kernels::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "default", run)
    torch.library.register_fake(qualified, fake)
    operator: Callable[..., Any] = getattr(torch.ops.svg_kernels, name).default

    def call(*args: Any) -> Any:
        if is_grad_enabled() or is_dynamo_compiling() or not _plain(args[0]):
            return operator(*args)
        return run(*args)

    return call


def _plain(x: Any) -> bool:
    """Return whether `x` is an ordinary tensor (or a list of them) and no mode is watching."""
    first = x[0] if type(x) is list else x
    return type(first) is torch.Tensor and not is_in_torch_dispatch_mode()
