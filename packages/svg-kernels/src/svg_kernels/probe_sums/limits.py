"""What probe_sums asks of a call beside its device: dtype, head size and rows of a probe."""

from __future__ import annotations

import torch

from svg_kernels import _dispatch
from svg_kernels._checks import FLOATS

TILE_ROWS = 128
COMPILED_HEAD_DIMS = (64, 128)
COMPILED_PROBE_ROWS = 8  # or more: a thread block holds whole tiles


def unsupported(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dims: tuple[int, int],
    probe_rows: int,
) -> str | None:
    """Return in a sentence why the backend `name` cannot compute such a call; None if it can.

    Args:
        name: `"cuda"`, `"triton"` or `"reference"`.
        device: where the tensors are.
        dtype: of probes, keys and values.
        head_dims: channels of a key and of a value.
        probe_rows: rows of a probe.
    """
    if dtype not in FLOATS:
        return f"probes must be fp16, bf16 or fp32, got {dtype}"
    if name == "triton":
        return "is not written in Triton here; svg_attention.planning has such a kernel"
    reason = _not_compiled(device, dtype, head_dims, probe_rows) if name == "cuda" else None
    return reason or _dispatch.unsupported(name, device)


def _not_compiled(
    device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int], probe_rows: int
) -> str | None:
    """Return why the sm_90a kernel does not cover a call, before any library is loaded."""
    if device.type != "cuda":
        return f"needs tensors on a CUDA device, these are on {device.type!r}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"is written for compute capability 9.0, this GPU has {major}.{minor}"
    if head_dims[0] not in COMPILED_HEAD_DIMS or head_dims[0] != head_dims[1]:
        return f"head_dim of keys and values must be 64 or 128 for both, got {head_dims}"
    if dtype != torch.bfloat16:
        return f"probes must be bf16, got {dtype}"
    if probe_rows < COMPILED_PROBE_ROWS:
        return f"a probe must have {COMPILED_PROBE_ROWS} rows or more, got {probe_rows}"
    return None
