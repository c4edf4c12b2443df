"""What a comparison ran on, and what else ran there."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from svg_models.loading import LoadedPipeline

__all__ = ["CoreTimes", "machine_facts", "others_at_work"]

MOST_MISSING = 0.1
"""Share of its threads that this program may have had to do without."""


def machine_facts(loaded: LoadedPipeline, computed: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what a comparison ran on, and by what."""
    import diffusers

    on_gpu = loaded.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(loaded.device) if on_gpu else _processor(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        **computed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "svg-attention": metadata.version("svg-attention"),
        "svg-models": metadata.version("svg-models"),
    }


@dataclass(frozen=True, kw_only=True)
class CoreTimes:
    """Seconds of processor time up to a moment.

    Attributes:
        wall: the moment.
        busy: of all programs, over the cores that this one may use; None if nobody says.
        own: of this program, all threads.
        cores: that this program may use.
    """

    wall: float
    busy: float | None
    own: float
    cores: int

    @classmethod
    def now(cls) -> CoreTimes:
        """Read the clocks of this machine."""
        usage = os.times()
        allowed = _allowed_cores()
        return cls(
            wall=time.perf_counter(),
            busy=_busy_seconds(allowed),
            own=usage.user + usage.system,
            cores=len(allowed),
        )


def others_at_work(before: CoreTimes, after: CoreTimes, *, threads: int) -> str:
    """Return how busy other programs kept the cores, if that took any from this one.

    Args:
        before: when the measurement began.
        after: when it ended.
        threads: that this program computes with.

    Returns:
        A phrase such as "1.9 of 2 cores"; nothing if there was room for all threads.
    """
    elapsed = after.wall - before.wall
    if before.busy is None or after.busy is None or elapsed <= 0:
        return ""
    others = max(0.0, (after.busy - before.busy) - (after.own - before.own)) / elapsed
    missing = threads - (after.cores - others)
    if missing <= MOST_MISSING * threads:
        return ""
    return f"other programs kept {others:.1f} of {after.cores} cores busy"


def _allowed_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _busy_seconds(cores: set[int]) -> float | None:
    """Return the seconds in which any program ran on these cores; None if nobody says."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        ticks = 0
        for name, *numbers in (line.split() for line in lines):
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
                user, nice, system, _, _, irq, soft, steal = map(int, numbers[:8])
                ticks += user + nice + system + irq + soft + steal
    except (OSError, ValueError):
        return None
    return ticks / float(os.sysconf("SC_CLK_TCK"))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
