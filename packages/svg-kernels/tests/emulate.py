"""Compile the portable CUDA sources for the CPU, against `emulator/` in place of CUDA."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from svg_kernels import _build

SOURCES = Path(__file__).parents[1] / "csrc"
EMULATOR = Path(__file__).parent / "emulator"
KERNELS = ("norm", "gate_residual", "rope", "qk_norm_rope", "permute_rows")
_LAUNCH = re.compile(
    r"([A-Za-z_][\w.]*(?:<[\w, ]*>)?(?:\(\w+\))?)<<<(.+?),\s*([\w.]+),\s*0,\s*stream>>>"
    r"\(([^;]*)\);",
    re.DOTALL,
)


def missing() -> str:
    """Return what keeps this machine from emulating, empty if nothing does."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler was found"
    if _build.find_headers() is None:
        return "apache-tvm-ffi is not installed"
    return ""


def build(folder: Path) -> Path:
    """Translate the launches, compile everything, and return the library."""
    copy = folder / "csrc"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("attention", "hopper", "*.cu"))
    shutil.copy(EMULATOR / "ptx.cuh", copy / "ops")
    include = [f"-I{path}" for path in (EMULATOR, copy, _build.find_headers())]
    common = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-fPIC", "-Wno-attributes"]
    commands, objects = [], []
    for name in KERNELS:
        text, launches = _LAUNCH.subn(
            r"emulated::launch(\2, \3, [&] { \1(\4); });",
            (SOURCES / "ops" / f"{name}.cu").read_text(),
        )
        if not launches or "<<<" in text:
            raise RuntimeError(f"{name}.cu has a launch that emulate.py does not recognise")
        source = copy / f"{name}.cc"
        source.write_text(text)
        objects.append(str(source.with_suffix(".o")))
        commands.append([*common, *include, "-c", str(source), "-o", objects[-1]])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_run, commands))
    library = folder / "libemulated.so"
    _run([*common, "-shared", *objects, "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
