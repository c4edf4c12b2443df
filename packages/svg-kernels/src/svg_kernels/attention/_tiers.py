"""Which tier computes an attention call: here head size and dtype matter as well as the device."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from svg_kernels import _backends
from svg_kernels.errors import UnsupportedError

MAX_HEAD_DIM = 256
COMPILED_HEAD_DIMS = (64, 128)
_MODULES = {
    "cuda": "svg_kernels.attention._cuda",
    "triton": "svg_kernels.attention._triton",
    "reference": "svg_kernels.attention.reference",
}
_chosen: dict[tuple[str, torch.device, torch.dtype, int], Any] = {}


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Any:
    """Return the module that computes such a call, or raise UnsupportedError."""
    wanted = (backend, device, dtype, head_dim)
    module = _chosen.get(wanted)
    if module is None:
        module = _chosen[wanted] = importlib.import_module(_MODULES[_name(*wanted)])
    return module


def unsupported(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say in a sentence why the tier `name` cannot compute such a call; None if it can.

    Args:
        name: `"cuda"`, `"triton"` or `"reference"`.
        device: where the tensors are.
        dtype: of query, key and value.
        head_dim: D.
    """
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}"
    if dtype not in _backends.FLOATS:
        return f"query must be fp16, bf16 or fp32, got {dtype}"
    if name == "cuda":
        reason = _not_compiled(device, dtype, head_dim)
        if reason:
            return reason
    tier = _backends.probe(name, device)
    return None if tier.available else tier.note


def _name(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if backend != "auto" and backend not in _backends.ORDER:
        raise ValueError(f"backend must be 'auto' or one of {_backends.ORDER}, got {backend!r}")
    if backend == "auto":
        for name in _backends.ORDER[:-1]:
            if device.type != "cpu" and unsupported(name, device, dtype, head_dim) is None:
                return name
        return _backends.ORDER[-1]
    if unsupported(backend, device, dtype, head_dim) is None:
        return backend
    reasons = {
        name: unsupported(name, device, dtype, head_dim) or "can run" for name in _backends.ORDER
    }
    raise UnsupportedError(f"block_sparse_attention with backend {backend!r} on {device}", reasons)


def _not_compiled(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Say why the sm_90a kernel does not cover a call, without loading or building the library."""
    if device.type != "cuda":
        return f"needs tensors on a CUDA device, these are on {device.type!r}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"is written for compute capability 9.0, this GPU has {major}.{minor}"
    if head_dim not in COMPILED_HEAD_DIMS:
        return f"head_dim must be 64 or 128, got {head_dim}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"query must be fp16 or bf16, got {dtype}"
    return ""
