"""The most memory that a stretch of work took."""

from __future__ import annotations

import re
from pathlib import Path

import torch

__all__ = ["PeakMemory"]


class PeakMemory:
    """Measure the most memory taken inside a `with` block: on a GPU, or else by this process.

    Args:
        device: where the work is done.

    Attributes:
        bytes: known at the end; None where nobody counts.
    """

    def __init__(self, device: str) -> None:
        self._gpu = torch.device(device) if device.startswith("cuda") else None
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)
        else:
            self._counts = _forget_peak()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._gpu is not None:
            self.bytes = torch.cuda.max_memory_allocated(self._gpu)
        elif self._counts:
            self.bytes = _peak()


def _forget_peak() -> bool:
    """Have Linux count the peak of this process from now on; return whether it does."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak() -> int | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024
