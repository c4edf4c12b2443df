"""Who computes planning: Triton on a GPU, plain torch elsewhere; there is no compiled form."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from svg_attention.errors import UnsupportedError

PLANNERS = ("triton", "reference")
# Channels of a head that the kernels take.
MAX_HEAD_DIM = 256
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Nats by which the weight of a centroid is raised at most: a tile's rows are not all like the probe
# that finds one key dominate a cluster.
LARGEST_BIAS = 8.0
_selected: dict[tuple[str, torch.device], Any] = {}


def select_planner(backend: str, device: torch.device) -> Any:
    """Return the module that computes planning on `device`.

    Raises:
        ValueError: if there is no planner of that name.
        UnsupportedError: if `backend` cannot run on this device.
    """
    module = _selected.get((backend, device))
    if module is None:
        name = planner_name(backend, device)
        module = importlib.import_module(f"svg_attention.planning.{name}")
        _selected[backend, device] = module
    return module


def planner_for(rows: Tensor) -> str:
    """Return which planner "auto" takes for a call with such query rows."""
    if rows.dtype not in FLOATS or rows.shape[-1] > MAX_HEAD_DIM:
        return "reference"
    return planner_name("auto", rows.device)


def planner_name(backend: str, device: torch.device) -> str:
    """Return the name of the planner that `backend` means on `device`; see `select_planner`."""
    if backend not in ("auto", *PLANNERS):
        raise ValueError(f"backend must be 'auto' or one of {PLANNERS}, got {backend!r}")
    if backend == "reference" or (backend == "auto" and device.type == "cpu"):
        return "reference"
    reason = why_not_triton(device)
    if not reason:
        return "triton"
    if backend == "auto":
        return "reference"
    raise UnsupportedError({"triton": reason, "reference": "can run, but was not asked for"})


def why_not_triton(device: torch.device) -> str:
    """Return why the kernels cannot run on `device`, empty when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'svg-attention[triton]'"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        # Interpreted: correct but slow, so only on request.
        return ""
    if device.type != "cuda":
        return f"needs tensors on a CUDA device, these are on {device.type!r}"
    if torch.version.cuda is None:
        return "this torch was not built for CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return ""
