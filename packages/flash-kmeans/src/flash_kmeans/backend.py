"""Which backend runs a request: plain torch everywhere, Triton where it can."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from .checks import Backend
from .errors import UnsupportedError

MINIMUM_CAPABILITY = (8, 0)
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Return whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_obstacle(x: Tensor) -> str | None:
    """Return why the Triton backend cannot take these points, or None if it can."""
    if not _HAS_TRITON:
        return "the triton package is not installed"
    if x.dtype == torch.float64:
        return "float64 points are not supported; use float32 or backend='reference'"
    if interpreting():
        return "the interpreter computes bfloat16 wrongly" if x.dtype == torch.bfloat16 else None
    if x.device.type != "cuda":
        return f"points are on {x.device.type}, a CUDA device is needed"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < MINIMUM_CAPABILITY:
        return f"compute capability 8.0 or newer is needed, this device has {capability}"
    return None


def select_backend(x: Tensor, backend: Backend) -> Backend:
    """Return "triton" or "reference"; an explicit request that cannot run is an error.

    Raises:
        UnsupportedError: if `backend="triton"` cannot run on these points; it says why.
    """
    if backend == "reference":
        return "reference"
    obstacle = triton_obstacle(x)
    if obstacle is None and (backend == "triton" or not interpreting()):
        return "triton"
    if backend == "triton":
        raise UnsupportedError({"triton": str(obstacle)})
    return "reference"
