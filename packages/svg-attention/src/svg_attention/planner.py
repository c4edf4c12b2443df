"""Where a plan is built: by the kernels of `svg_kernels` on a GPU, in plain torch elsewhere."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

# Channels of a head that the probing kernels take.
WIDEST = 256
_found: dict[torch.device, ModuleType | None] = {}


def device_planner(x: Tensor) -> ModuleType | None:
    """Return `svg_kernels.planning` if it plans on the device of `x` with kernels, else None.

    Its functions decide as the ones of this package do; only where two clusters differ by rounding
    may another one of them cross the threshold.
    """
    if x.device.type != "cuda":
        return None
    if x.device not in _found:
        _found[x.device] = _find(x.device)
    return _found[x.device]


def device_prober(rows: Tensor) -> ModuleType | None:
    """Return the planner of the device if its kernels take rows of this type and width."""
    narrow = rows.shape[-1] <= WIDEST and rows.dtype != torch.float64
    return device_planner(rows) if narrow else None


def _find(device: torch.device) -> ModuleType | None:
    if importlib.util.find_spec("svg_kernels") is None:
        return None
    from svg_kernels import planning

    return planning if planning.runs_on(device) else None
