"""What a comparison ran on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from svg_models.loading import LoadedPipeline

__all__ = ["machine_facts"]


def machine_facts(loaded: LoadedPipeline, computed: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what a comparison ran on, and by what."""
    import diffusers

    on_gpu = loaded.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(loaded.device) if on_gpu else _processor(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "busy": None if on_gpu else _busy(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        **computed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "svg-attention": metadata.version("svg-attention"),
        "svg-models": metadata.version("svg-models"),
    }


def _busy() -> str | None:
    """Return how much else the processor had to do, if that spoils the times."""
    cores = os.cpu_count() or 1
    if not hasattr(os, "getloadavg") or os.getloadavg()[0] <= 1.5 * cores:
        return None
    return f"load {os.getloadavg()[0]:.0f} on {cores} cores"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
