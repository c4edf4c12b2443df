"""Find the compiled library, or build it at first use, and say why where neither works."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
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
    """Return the loaded library, whose attributes are the launchers of `csrc/exports.cc`."""
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
        arch = f"{major}{minor}"
        found = cache_dir(arch) / _build.LIBRARY
        if not found.exists():
            reason = _build.missing()
            if reason:
                return f"this wheel has no compiled library, and it cannot be built: {reason}"
            try:
                build_once(found.parent, arch)
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
        _module.probe(device.index or 0)
    except RuntimeError as error:
        return f"{_path} does not run on this GPU and driver: {error}"
    return ""


def cache_dir(arch: str) -> Path:
    """Return where a library built here for `arch` lives: one folder per state of the sources."""
    digest = hashlib.sha256(arch.encode())
    for file in sorted(_build.sources(_PACKAGE).iterdir()):
        digest.update(file.read_bytes())
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "svg-kernels" / digest.hexdigest()[:16]


def build_once(target: Path, arch: str) -> None:
    """Build the library for one architecture into `target`; of several processes one builds.

    The others wait for it. A message on stderr says what the wait is for.
    """
    target.mkdir(parents=True, exist_ok=True)
    with _lock(target / "lock"):
        if (target / _build.LIBRARY).exists():
            return
        print(f"svg-kernels: compiling for sm_{arch}, about a minute, once ...", file=sys.stderr)
        began = time.monotonic()
        _build.build(_build.sources(_PACKAGE), target, (arch,), jobs=os.cpu_count() or 1)
        print(
            f"svg-kernels: compiled in {time.monotonic() - began:.0f} s into {target}",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    import fcntl

    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
