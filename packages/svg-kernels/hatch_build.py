"""Put the compiled library into the wheel where nvcc is found; otherwise build a pure wheel."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# NVIDIA's compiler as wheels, for machines without a toolkit: SVG_KERNELS_NVCC=wheels.
NVCC_WHEELS = [
    f"nvidia-{name}>=13.0,<14"
    for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
]


class KernelsBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Compile `csrc/` for the wheel. An editable install compiles at first use instead."""

    PLUGIN_NAME = "custom"
    fresh: tempfile.TemporaryDirectory[str] | None = None

    def dependencies(self) -> list[str]:
        """Return what the build needs beyond `build-system.requires`."""
        return NVCC_WHEELS if os.environ.get("SVG_KERNELS_NVCC") == "wheels" else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add sources and, where it can be built, the library to a standard wheel."""
        if self.target_name != "wheel" or version != "standard":
            return
        root = Path(self.root)
        csrc = root / "csrc"
        build_data["force_include"][str(csrc)] = "svg_kernels/csrc"
        if os.environ.get("SVG_KERNELS_PURE") == "1":
            self.app.display_info("SVG_KERNELS_PURE=1: building a pure wheel")
            return
        tool = load_build_module(root)
        reason = tool.missing()
        if reason:
            self.app.display_warning(f"building a pure wheel, without the library: {reason}")
            return
        # A fresh folder: what goes into a wheel comes from these sources alone, never from a cache.
        self.fresh = tempfile.TemporaryDirectory(prefix="svg-kernels-")
        library = tool.build(csrc, Path(self.fresh.name) / "lib", tool.ARCHITECTURES)
        for file in (library, library.with_name(tool.REPORT)):
            build_data["force_include"][str(file)] = f"svg_kernels/lib/{file.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag(library)}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the folder that the library was built in."""
        if self.fresh is not None:
            self.fresh.cleanup()


def load_build_module(root: Path) -> ModuleType:
    """Load `svg_kernels/_build.py` alone: the package needs torch, which a build does not have."""
    spec = importlib.util.spec_from_file_location(
        "svg_kernels_build", root / "src" / "svg_kernels" / "_build.py"
    )
    if spec is None or spec.loader is None:
        raise RuntimeError(f"svg_kernels/_build.py is missing below {root}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def platform_tag(library: Path) -> str:
    """Return the manylinux tag of the oldest glibc that has every symbol the library asks for."""
    minors = [int(m) for m in re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes())]
    return f"manylinux_2_{max([17, *minors])}_{platform.machine()}"
