"""What the launchers of all planning kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Launch parameters: rows and columns of a step, warps, and steps in flight."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 3

    def constants(self) -> dict[str, int]:
        """Return the sizes under every name that a kernel has for them."""
        rows = dict.fromkeys(("BLOCK_P", "BLOCK_R"), self.rows)
        return rows | dict.fromkeys(("BLOCK_C", "BLOCK_N"), self.columns)


def table_key(x: Tensor) -> tuple[int, int]:
    """Return the key of a tensor of rows in a table of blocks."""
    return x.element_size(), max(64, triton.next_power_of_2(x.shape[-1]))


def on(device: torch.device) -> torch.cuda.device:
    """Return a context in which kernels are launched on `device`."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
