"""Which tier plans: Triton on a GPU, plain torch elsewhere; there is no compiled form."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from svg_kernels import _backends
from svg_kernels.errors import UnsupportedError

ORDER = ("triton", "reference")
# What planning is made of; choosing is also merging what was chosen.
_MODULES = {
    ("probe", "triton"): "svg_kernels.planning._kernels.probes",
    ("probe", "reference"): "svg_kernels.planning.reference_probes",
    ("errors", "triton"): "svg_kernels.planning._kernels.errors",
    ("errors", "reference"): "svg_kernels.planning.reference_probes",
    ("patterns", "triton"): "svg_kernels.planning._kernels.patterns",
    ("patterns", "reference"): "svg_kernels.planning.reference_probes",
    ("choose", "triton"): "svg_kernels.planning._triton",
    ("choose", "reference"): "svg_kernels.planning.reference",
}
_chosen: dict[tuple[str, str, torch.device], Any] = {}


def choose(backend: str, device: torch.device, part: str = "choose") -> Any:
    """Return the module that does this part of planning on `device`, or raise UnsupportedError."""
    wanted = (part, backend, device)
    module = _chosen.get(wanted)
    if module is None:
        name = _name(backend, device)
        module = _chosen[wanted] = importlib.import_module(_MODULES[part, name])
    return module


def runs_on(device: torch.device) -> bool:
    """Return whether `"auto"` plans with kernels on `device`, rather than in plain torch."""
    return _name("auto", device) != "reference"


def _name(backend: str, device: torch.device) -> str:
    if backend not in ("auto", *ORDER):
        raise ValueError(f"backend must be 'auto' or one of {ORDER}, got {backend!r}")
    triton = _backends.probe("triton", device)
    if backend == "auto":
        return "triton" if device.type != "cpu" and triton.available else "reference"
    if backend == "triton" and not triton.available:
        reasons = {"triton": triton.note, "reference": "can run"}
        raise UnsupportedError(f"planning with backend 'triton' on {device}", reasons)
    return backend
