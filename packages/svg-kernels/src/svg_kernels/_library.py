"""Find the compiled library for a device, or build it at first use; say why where neither works."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svg_kernels import _build, _cache

_PACKAGE = Path(__file__).resolve().parent
_REQUIREMENT = "apache-tvm-ffi>=0.1.13.post2,<0.2"


@dataclass(frozen=True, kw_only=True)
class Library:
    """What was found for one device: a loaded library and its file, or why there is none."""

    functions: Any = None
    path: Path | None = None
    reason: str | None = None


_libraries: dict[torch.device, Library] = {}
_loaded: dict[Path, Any] = {}  # devices of one architecture share a library


def functions(device: torch.device) -> Any:
    """Return the library of `device`; its attributes are what the files of `csrc/` export."""
    return _library(device).functions


def path(device: torch.device) -> Path | None:
    """Return the file that was loaded for `device`, or None."""
    return _library(device).path


def unsupported(device: torch.device) -> str | None:
    """Return why no library can run on `device`, None when one can; loads or builds it."""
    return _library(device).reason


def require_launch(launched: bool) -> None:
    """Raise RuntimeError if a launcher refused arguments that had passed every check in words."""
    if not launched:
        raise RuntimeError(
            "the compiled kernels did not take arguments that had passed every check; please "
            "report their shapes, strides and dtypes, and use backend='triton' meanwhile"
        )


def _library(device: torch.device) -> Library:
    library = _libraries.get(device)
    if library is None:
        library = _libraries[device] = _find(device)
    return library


def _find(device: torch.device) -> Library:
    if importlib.util.find_spec("tvm_ffi") is None:
        return Library(reason=f"apache-tvm-ffi is not installed; pip install '{_REQUIREMENT}'")
    packed = _PACKAGE / "lib" / _build.LIBRARY
    if packed.exists():
        try:
            return _check(_load(packed), packed, device)
        except (RuntimeError, OSError) as error:
            return Library(reason=f"{packed} cannot be loaded: {error}")
    try:
        return _find_built(device)
    except (RuntimeError, OSError) as error:
        return Library(reason=f"building the library failed: {error}")


def _find_built(device: torch.device) -> Library:
    """Return the library that was built for the architecture of `device`, or build it."""
    major, minor = torch.cuda.get_device_capability(device)
    folder, architectures = _build.sources(_PACKAGE), (f"{major}{minor}",)
    jobs = os.cpu_count() or 1
    found = _cache.find_cached(folder, architectures)
    if found is None:
        if reason := _build.missing():
            return Library(
                reason=f"this wheel has no compiled library, and it cannot be built: {reason}"
            )
        found = _cache.build_once(folder, architectures, jobs)
    try:
        module = _load(found)
    except (RuntimeError, OSError) as error:
        if reason := _build.missing():
            return Library(reason=f"{found} cannot be loaded ({error}) nor built anew: {reason}")
        _cache.tell(f"{found} cannot be loaded ({error}); building it anew")
        found = _cache.build_once(folder, architectures, jobs, replace=True)
        module = _load(found)
    return _check(module, found, device)


def _check(module: Any, path: Path, device: torch.device) -> Library:
    """Return the library for `device`, or why it does not run there."""
    try:
        module.check_device(device.index or 0)
    except RuntimeError as error:
        return Library(reason=f"{path} does not run on this GPU and driver: {error}")
    return Library(functions=module, path=path)


def _load(path: Path) -> Any:
    """Load a library, once for all devices; raise OSError if it is not one of ours."""
    import tvm_ffi

    if path not in _loaded:
        module = tvm_ffi.load_module(str(path))
        try:
            module.check_device  # noqa: B018
        except AttributeError as error:
            raise OSError(f"{path} does not export check_device") from error
        _loaded[path] = module
    return _loaded[path]
