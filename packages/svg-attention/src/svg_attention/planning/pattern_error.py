"""Comparing, on the device, what a few query rows lose when they read patterns of keys only."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_attention._ops import define_op
from svg_attention.planning.dispatch import select_planner


def pattern_error(
    rows: Tensor, key: Tensor, value: Tensor, reads: Tensor, *, scale: float, backend: str = "auto"
) -> Tensor:
    """Return the mean square error that each of two patterns makes on some query rows.

    Compares softmax attention over all valid keys with softmax attention over those a pattern
    reads. Keys and values are read once; nothing larger than `reads` is kept.

    Args:
        rows: `[B, H, R, D]`, floating. Triton takes fp16, bf16 and fp32, D and Dv at most 256.
        key: `[B, Hk, S, D]`, typed as `rows`; H is a multiple of Hk.
        value: `[B, Hk, S, Dv]`, typed as `rows`.
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
    if rows.ndim != 4:
        raise ValueError(f"rows must be [B, H, R, D], got {list(rows.shape)}")
    if not rows.is_floating_point() or reads.dtype != torch.uint8:
        raise TypeError(
            f"rows must be floating and reads uint8, got {rows.dtype} and {reads.dtype}"
        )
    batch, heads, count, width = rows.shape
    for name, x, last in (("key", key, width), ("value", value, value.shape[-1])):
        if x.ndim != 4 or (x.shape[0], x.shape[3]) != (batch, last) or x.shape[:3] != key.shape[:3]:
            raise ValueError(f"{name} must be [{batch}, Hk, S, {last}], got {list(x.shape)}")
        if x.dtype != rows.dtype:
            raise TypeError(f"{name} must be {rows.dtype} like rows, got {x.dtype}")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"{heads} query heads are not a multiple of {key.shape[1]} key heads")
    if tuple(reads.shape) != (batch, count, key.shape[2]):
        raise ValueError(f"reads must be {[batch, count, key.shape[2]]}, got {list(reads.shape)}")
    if not rows.device == key.device == value.device == reads.device:
        raise ValueError(f"key, value and reads must be on {rows.device} like rows")
    errors: Tensor = _pattern_error(rows, key, value, reads, float(scale), backend)
    return errors


def _run(
    rows: Tensor, key: Tensor, value: Tensor, reads: Tensor, scale: float, backend: str
) -> Tensor:
    errors: Tensor = select_planner(backend, rows.device).pattern_error(
        rows, key, value, reads, scale
    )
    return errors


def _fake(
    rows: Tensor, key: Tensor, value: Tensor, reads: Tensor, scale: float, backend: str
) -> Tensor:
    return rows.new_empty(2, *rows.shape[:2], dtype=torch.float32)


_pattern_error = define_op(
    "pattern_error",
    "(Tensor rows, Tensor key, Tensor value, Tensor reads, float scale, str backend) -> Tensor",
    _run,
    _fake,
)
