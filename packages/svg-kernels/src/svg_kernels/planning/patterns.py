"""Comparing, on the device, what a few query rows lose when they read patterns of keys only."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels._backends import FLOATS, register
from svg_kernels.planning._tiers import choose


def pattern_errors(
    rows: Tensor, key: Tensor, value: Tensor, reads: Tensor, *, scale: float, backend: str = "auto"
) -> Tensor:
    """Return the mean square error that each of two patterns makes on some query rows.

    Compares softmax attention over all valid keys with softmax attention over those a pattern
    reads. Keys and values are read once; nothing larger than `reads` is kept.

    Args:
        rows: `[B, H, R, D]`, fp16, bf16 or fp32, D at most 256.
        key: `[B, Hk, S, D]`, typed as `rows`; H is a multiple of Hk.
        value: `[B, Hk, S, Dv]`, typed as `rows`, Dv at most 256.
        reads: uint8 `[B, R, S]`: 1 for a valid key, plus 2 if the first pattern reads it, plus 4
            if the second does. Every row has to read some key in each pattern.
        scale: factor of the logits, above 0.
        backend: `"auto"`, `"triton"` or `"reference"`.

    Returns:
        fp32 `[2, B, H]`.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device.

    Source: Xi et al. 2025, arXiv:2502.01776, section 4.2 (online profiling).
    """
    if rows.ndim != 4 or not 1 <= rows.shape[3] <= 256:
        raise ValueError(f"rows must be [B, H, R, D], D from 1 to 256, got {list(rows.shape)}")
    if rows.dtype not in FLOATS or reads.dtype != torch.uint8:
        raise TypeError(
            f"rows must be fp16, bf16 or fp32 and reads uint8, got {rows.dtype} and {reads.dtype}"
        )
    batch, heads, count, width = rows.shape
    for name, x, last in (("key", key, width), ("value", value, value.shape[-1])):
        if x.ndim != 4 or (x.shape[0], x.shape[3]) != (batch, last) or x.shape[:3] != key.shape[:3]:
            raise ValueError(f"{name} must be [{batch}, Hk, S, {last}], got {list(x.shape)}")
        if x.dtype != rows.dtype:
            raise TypeError(f"{name} must be {rows.dtype} like rows, got {x.dtype}")
    if key.shape[1] == 0 or heads % key.shape[1] or not 1 <= value.shape[3] <= 256:
        raise ValueError(
            f"{heads} heads cannot share {key.shape[1]} key heads with {value.shape[3]} channels"
        )
    if tuple(reads.shape) != (batch, count, key.shape[2]):
        raise ValueError(f"reads must be {[batch, count, key.shape[2]]}, got {list(reads.shape)}")
    if not rows.device == key.device == value.device == reads.device:
        raise ValueError(f"key, value and reads must be on {rows.device} like rows")
    errors: Tensor = _pattern_errors(rows, key, value, reads, float(scale), backend)
    return errors


def _run(
    rows: Tensor, key: Tensor, value: Tensor, reads: Tensor, scale: float, backend: str
) -> Tensor:
    errors: Tensor = choose(backend, rows.device, "patterns").pattern_errors(
        rows, key, value, reads, scale
    )
    return errors


def _fake(
    rows: Tensor, key: Tensor, value: Tensor, reads: Tensor, scale: float, backend: str
) -> Tensor:
    return rows.new_empty(2, *rows.shape[:2], dtype=torch.float32)


_pattern_errors = register(
    "pattern_errors",
    "(Tensor rows, Tensor key, Tensor value, Tensor reads, float scale, str backend) -> Tensor",
    _run,
    _fake,
)
