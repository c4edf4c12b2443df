"""Find the compiled library, or build it at first use, and say why where neither works."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from svg_kernels import _build

_PACKAGE = Path(__file__).resolve().parent
_module: Any = None
_path: Path | None = None
_failure: str | None = None  # why there is no library; None: not tried yet
_devices: dict[torch.device, str] = {}


def functions() -> Any:
    """Return the loaded library; its attributes are what the files of `csrc/` export."""
    return _module


def path() -> Path | None:
    """Return the file that was loaded, or None."""
    return _path


def why_not(device: torch.device) -> str:
    """Return why the library cannot run on `device`, empty when it can; loads or builds it."""
    if device not in _devices:
        _devices[device] = _load(device) or _try(device)
    return _devices[device]


def _load(device: torch.device) -> str:
    global _module, _path, _failure
    if _module is not None:
        return ""
    if _failure is None:
        _failure = _find(device)
    return _failure


def _find(device: torch.device) -> str:
    global _module, _path
    if importlib.util.find_spec("tvm_ffi") is None:
        return "apache-tvm-ffi is not installed; pip install 'apache-tvm-ffi>=0.1.13.post2,<0.2'"
    found = _PACKAGE / "lib" / _build.LIBRARY
    if not found.exists():
        major, minor = torch.cuda.get_device_capability(device)
        folder, architectures = _build.sources(_PACKAGE), (f"{major}{minor}",)
        found = _build.cache_dir(folder, architectures) / _build.LIBRARY
        if not found.exists() and (reason := _build.missing()):
            return f"this wheel has no compiled library, and it cannot be built: {reason}"
        try:
            found = _build.build_once(folder, architectures, jobs=os.cpu_count() or 1)
        except (RuntimeError, OSError) as error:
            return f"building the library failed: {error}"
    try:
        import tvm_ffi

        _module = tvm_ffi.load_module(str(found))
    except (RuntimeError, OSError) as error:
        return f"{found} cannot be loaded: {error}"
    _path = found
    return ""


def _try(device: torch.device) -> str:
    try:
        _module.check_device(device.index or 0)
    except RuntimeError as error:
        return f"{_path} does not run on this GPU and driver: {error}"
    return ""
