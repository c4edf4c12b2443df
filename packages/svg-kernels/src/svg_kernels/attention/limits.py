"""What block-sparse attention asks of a call beside its device: head size and dtype."""

from __future__ import annotations

import torch

from svg_kernels import _dispatch
from svg_kernels._checks import FLOATS

MAX_HEAD_DIM = 256
COMPILED_HEAD_DIMS = (64, 128)


def unsupported(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return in a sentence why the backend `name` cannot compute such a call; None if it can.

    Args:
        name: `"cuda"`, `"triton"` or `"reference"`.
        device: where the tensors are.
        dtype: of query, key and value.
        head_dim: D.
    """
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}"
    if dtype not in FLOATS:
        return f"query must be fp16, bf16 or fp32, got {dtype}"
    reason = _not_compiled(device, dtype, head_dim) if name == "cuda" else None
    return reason or _dispatch.unsupported(name, device)


def _not_compiled(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why the sm_90a kernel does not cover a call, before any library is loaded."""
    if device.type != "cuda":
        return f"needs tensors on a CUDA device, these are on {device.type!r}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"is written for compute capability 9.0, this GPU has {major}.{minor}"
    if head_dim not in COMPILED_HEAD_DIMS:
        return f"head_dim must be 64 or 128, got {head_dim}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"query must be fp16 or bf16, got {dtype}"
    return None
