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
ATTENTION = ("block_sparse_attention_sm90a", "block_sparse_attention_fp8_sm90a")
_LAUNCH = re.compile(
    r"([A-Za-z_][\w.]*(?:<[\w, ]*>)?(?:\(\w+\))?)<<<(.+?),\s*([\w.]+),\s*(?:0|bytes),\s*stream>>>"
    r"\(([^;]*)\);",
    re.DOTALL,
)
_SHARED = "extern __shared__ __align__(1024) unsigned char raw[];"


def missing() -> str:
    """Return what keeps this machine from emulating, empty if nothing does."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler was found"
    if _build.find_headers() is None:
        return "apache-tvm-ffi is not installed"
    return ""


def build(folder: Path) -> Path:
    """Translate the launches of the portable kernels, compile them, and return the library."""
    return _build_kernels(folder, "ops", KERNELS)


def build_attention(folder: Path) -> Path:
    """Do the same for the attention kernels, with Hopper's instructions emulated."""
    return _build_kernels(folder, "attention", ATTENTION)


def _build_kernels(folder: Path, of: str, kernels: tuple[str, ...]) -> Path:
    copy = folder / "csrc"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("hopper", "*.cu"))
    shutil.copy(EMULATOR / "ptx.cuh", copy / "ops")
    include = [f"-I{path}" for path in (EMULATOR, copy, _build.find_headers())]
    common = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-fPIC", "-Wno-attributes"]
    commands, objects = [], []
    for name in kernels:
        text, launches = _LAUNCH.subn(
            r"emulated::launch(\2, \3, [&] { \1(\4); });",
            (SOURCES / of / f"{name}.cu").read_text(),
        )
        if not launches or "<<<" in text:
            raise RuntimeError(f"{name}.cu has a launch that emulate.py does not recognise")
        source = copy / f"{name}.cc"
        source.write_text(text.replace(_SHARED, "unsigned char* raw = emulated::dynamic_shared();"))
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
