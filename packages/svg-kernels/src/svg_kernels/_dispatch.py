"""Which backend computes an operation: `cuda`, `triton` or `reference`, selected once per device.

An operation is a folder whose modules `cuda.py`, `triton.py` and `reference.py` define the same
functions. `auto` takes the first of `ORDER` that can run; one asked for by name runs or raises.
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

from svg_kernels import _debug, _library
from svg_kernels.errors import UnsupportedError

ORDER = ("cuda", "triton", "reference")
_selected: dict[tuple[Any, ...], Any] = {}
_launchers: dict[tuple[str, torch.device], Any] = {}  # of devices that the compiled backend serves


@dataclass(frozen=True, kw_only=True)
class BackendStatus:
    """One backend on one device: whether it can run, and why or why not in a sentence."""

    name: str
    available: bool
    note: str


def unsupported(name: str, device: torch.device) -> str | None:
    """Return in a sentence why the backend `name` cannot run on `device`, None if it can.

    Asking for `cuda` loads the compiled library, or builds it at first use.
    """
    if name == "reference":
        return None
    reason = _no_cuda_device(device)
    if name == "cuda":
        return reason or _library.unsupported(device)
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if _interpreted(device) else reason


def backend_status(name: str, device: torch.device) -> BackendStatus:
    """Return whether the backend `name` can run on `device`, with the reason or a note."""
    reason = unsupported(name, device)
    if reason is not None:
        return BackendStatus(name=name, available=False, note=reason)
    if name == "cuda":
        note = str(_library.path(device))
    elif name == "reference":
        note = "plain torch runs on any device"
    else:
        note = (
            "interpreted on the CPU, for tests" if _interpreted(device) else "compiled at first use"
        )
    return BackendStatus(name=name, available=True, note=note)


def auto_backend(
    device: torch.device, *traits: Any, unsupported: Callable[..., str | None] = unsupported
) -> str:
    """Return the first backend of `ORDER` that can run; the interpreter is never taken unasked."""
    for name in ORDER[:-1]:
        if device.type != "cpu" and unsupported(name, device, *traits) is None:
            return name
    return ORDER[-1]


def select_backend(
    package: str,
    backend: str,
    device: torch.device,
    *traits: Any,
    unsupported: Callable[..., str | None] = unsupported,
) -> Any:
    """Return the module of the operation `package` that computes a call with `backend`.

    Args:
        package: the operation's package, which holds one module per backend.
        backend: `"auto"` or one of `ORDER`.
        device: where the tensors are.
        traits: what else decides (dtype, head size); hashable.
        unsupported: returns why a backend cannot run, from its name, the device and the traits.

    Raises:
        ValueError: if there is no such backend.
        UnsupportedError: if the backend asked for by name cannot run; it has every reason.
    """
    wanted = (package, backend, device, *traits)
    module = _selected.get(wanted)
    if module is None:
        name = _backend_name(package, backend, device, traits, unsupported)
        if name == "cuda" and not _debug.ENABLED:  # who checks indices goes through the operators
            _launchers[backend, device] = _library.functions(device)
        module = _selected[wanted] = importlib.import_module(f"{package}.{name}")
    return module


def _backend_name(
    package: str,
    backend: str,
    device: torch.device,
    traits: tuple[Any, ...],
    unsupported: Callable[..., str | None],
) -> str:
    if backend == "auto":
        return auto_backend(device, *traits, unsupported=unsupported)
    if backend not in ORDER:
        raise ValueError(f"backend must be 'auto' or one of {ORDER}, got {backend!r}")
    if unsupported(backend, device, *traits) is not None:
        reasons = {name: unsupported(name, device, *traits) or "can run" for name in ORDER}
        operation = package.rpartition(".")[2]
        raise UnsupportedError(f"{operation} with backend {backend!r} on {device}", reasons)
    return backend


def launchers(backend: str, x: Any) -> Any | None:
    """Return the compiled launchers if a call on `x` can go straight to them, else None.

    It can where nobody listens to torch's dispatcher (plain tensors, no gradients, nothing
    compiling or tracing) and an earlier call has selected the compiled backend for this device. The
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


def define_op(
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


def _interpreted(device: torch.device) -> bool:
    """Return whether Triton would interpret on this device: right but slow, so only on request."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _no_cuda_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs tensors on a CUDA device, these are on {device.type!r}"
    if torch.version.cuda is None:
        return "this torch was not built for CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return None
