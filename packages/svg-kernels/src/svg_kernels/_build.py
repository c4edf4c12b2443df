"""Compile `csrc/` into one shared library with nvcc; used by the wheel build and at first use.

Standard library only: `hatch_build.py` loads this file by its path, before the package exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARY = "libsvg_kernels.so"
REPORT = "ptxas.txt"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
_SUFFIX = re.compile(r"_sm(\d+[af]?)$")


def sources(package: Path) -> Path:
    """Return the folder of the sources: inside the wheel, else beside `src/` in a checkout."""
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parents[1] / "csrc"


def find_nvcc() -> Path | None:
    """Return nvcc from `CUDA_HOME`, `PATH`, NVIDIA's PyPI wheels or `/usr/local/cuda`."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        candidates += sorted(Path(folder).glob("cu[0-9]*/bin/nvcc"), reverse=True)
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def find_headers() -> Path | None:
    """Return the include folder of apache-tvm-ffi, without importing it."""
    spec = importlib.util.find_spec("tvm_ffi")
    folders = (spec.submodule_search_locations or []) if spec else []
    found = (Path(folder) / "include" for folder in folders)
    return next((path for path in found if (path / "tvm" / "ffi").is_dir()), None)


def missing() -> str:
    """Return what keeps this machine from building, empty if nothing does."""
    if not sys.platform.startswith("linux"):
        return f"the compiled kernels are built on Linux only, this is {sys.platform}"
    if find_nvcc() is None:
        return "nvcc was not found (looked at CUDA_HOME, PATH, NVIDIA's wheels, /usr/local/cuda)"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler was found; install one or set CXX"
    if find_headers() is None:
        return "apache-tvm-ffi is not installed; pip install apache-tvm-ffi"
    return ""


def architectures_of(source: Path, wanted: Iterable[str]) -> tuple[str, ...]:
    """Return what to compile `source` for: `x_sm90a.cu` is built for that architecture alone."""
    suffix = _SUFFIX.search(source.stem)
    if suffix is None:
        return tuple(wanted)
    base = suffix[1].rstrip("af")
    return (suffix[1],) if base in {arch.rstrip("af") for arch in wanted} else ()


def compile_command(
    nvcc: Path, source: Path, target: Path, architectures: Sequence[str], ptx: bool
) -> list[str]:
    """Return the nvcc command that compiles one file for `architectures`."""
    command = [str(nvcc), "-c", str(source), "-o", str(target), "-std=c++17", "-O3"]
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"]
    for arch in architectures:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    if ptx and architectures[0].isdigit():
        # For GPUs newer than the list; the driver compiles it at load.
        command += ["-gencode", f"arch=compute_{architectures[0]},code=compute_{architectures[0]}"]
    return [*command, "-Xptxas", "-v", "-Wno-deprecated-gpu-targets"]


def cache_dir(source_dir: Path, architectures: Sequence[str]) -> Path:
    """Return where a library built here lives: one folder per state of the sources."""
    digest = hashlib.sha256(repr(tuple(architectures)).encode())
    for file in sorted(source_dir.rglob("*.*")):
        digest.update(str(file.relative_to(source_dir)).encode() + b"\0" + file.read_bytes())
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "svg-kernels" / digest.hexdigest()[:16]


def build_once(source_dir: Path, architectures: Sequence[str], jobs: int = 2) -> Path:
    """Return the cached library for these sources, built now if it is not there.

    Of several processes one builds and the others wait; a message on stderr says for what. A
    process that dies while it builds leaves no half-written library.

    Args:
        source_dir: folder of the sources, whose `.cu` files lie in folders of their own.
        architectures: compute capabilities without the dot, oldest first.
        jobs: how many files to compile at once.

    Raises:
        RuntimeError: as `build`.
    """
    target = cache_dir(source_dir, architectures)
    if (target / LIBRARY).exists():
        return target / LIBRARY
    target.mkdir(parents=True, exist_ok=True)
    with _locked(target / "lock"):
        if not (target / LIBRARY).exists():
            names = ", ".join(f"sm_{arch}" for arch in architectures)
            print(f"svg-kernels: compiling for {names}, once; please wait", file=sys.stderr)
            began = time.monotonic()
            build(source_dir, target, architectures, jobs)
            took = time.monotonic() - began
            print(f"svg-kernels: compiled in {took:.0f} s into {target}", file=sys.stderr)
    return target / LIBRARY


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    import fcntl

    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build(
    source_dir: Path, target_dir: Path, architectures: Sequence[str] = ARCHITECTURES, jobs: int = 2
) -> Path:
    """Build the library and its register report into `target_dir`; return the library.

    Args:
        source_dir: folder of the sources, whose `.cu` files lie in folders of their own.
        target_dir: folder to write to; the library appears there whole or not at all.
        architectures: compute capabilities without the dot, oldest first.
        jobs: how many files to compile at once.

    Raises:
        RuntimeError: if something the build needs is missing, or a compiler fails; its output is
            in the message.
    """
    reason = missing()
    nvcc, headers = find_nvcc(), find_headers()
    if reason or nvcc is None or headers is None:
        raise RuntimeError(f"cannot build the kernels: {reason}")
    files = [(path, architectures_of(path, architectures)) for path in source_dir.rglob("*.cu")]
    files = sorted((path, archs) for path, archs in files if archs)
    target_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target_dir) as scratch:
        objects = [Path(scratch) / f"{path.stem}.o" for path, _ in files]
        commands = [
            [
                *compile_command(nvcc, path, out, archs, len(architectures) > 1),
                *(f"-I{source_dir}", f"-I{headers}"),
            ]
            for (path, archs), out in zip(files, objects, strict=True)
        ]
        with ThreadPoolExecutor(jobs) as pool:
            report = "".join(pool.map(_run, commands))
        library = Path(scratch) / LIBRARY
        script = Path(scratch) / "exports.map"
        script.write_text("{ global: __tvm_ffi_*; local: *; };\n")
        link = [str(nvcc), "-shared", "-cudart", "static", "-o", str(library)]
        link += [f"-L{nvcc.parents[1] / 'lib'}", *map(str, objects)]
        link += ["-Xlinker", f"--version-script={script}", "-Xlinker", "-s"]
        _run([*link, "-Wno-deprecated-gpu-targets"])
        (target_dir / REPORT).write_text(report)
        return library.replace(target_dir / LIBRARY)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
