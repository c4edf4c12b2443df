"""Compile the portable CUDA sources for the CPU, against `emulator/` in place of CUDA."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from svg_kernels import _build

SOURCES = Path(__file__).parents[1] / "csrc"
EMULATOR = Path(__file__).parent / "emulator"
KERNELS = ("norm", "gate", "rope", "qk_norm_rope", "permute")
_LAUNCH = re.compile(
    r"([A-Za-z_][\w.]*(?:<[\w, ]*>)?(?:\(\w+\))?)<<<(.+?),\s*([\w.]+),\s*0,\s*stream>>>"
    r"\(([^;]*)\);",
    re.DOTALL,
)


def missing() -> str:
    """Say what keeps this machine from emulating, or return an empty string."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler was found"
    if _build.find_headers() is None:
        return "apache-tvm-ffi is not installed"
    return ""


def build(folder: Path) -> Path:
    """Translate the launches, compile everything, and return the library."""
    for header in (*SOURCES.glob("*.cuh"), SOURCES / "launch.h", SOURCES / "arguments.h"):
        shutil.copy(header, folder)
    shutil.copy(EMULATOR / "ptx.cuh", folder)  # found first: it lies beside who includes it
    files = [SOURCES / "exports.cc"]
    for name in KERNELS:
        text, launches = _LAUNCH.subn(
            r"emulated::launch(\2, \3, [&] { \1(\4); });", (SOURCES / f"{name}.cu").read_text()
        )
        if not launches or "<<<" in text:
            raise RuntimeError(f"{name}.cu has a launch that emulate.py does not recognise")
        files.append(folder / f"{name}.cc")
        files[-1].write_text(text)
    library = folder / "libemulated.so"
    compiler = os.environ.get("CXX", "c++")
    common = [compiler, "-std=c++17", "-O1", "-fPIC", "-Wno-attributes", f"-I{EMULATOR}"]
    common += [f"-I{folder}", f"-I{_build.find_headers()}"]
    command = [*common, "-shared", *map(str, files), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return library
