"""What the backends can compute on this machine, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from svg_attention.backends import AUTO_BACKENDS, BACKENDS
from svg_attention.plan import SparsePlan


@dataclass(frozen=True, kw_only=True)
class BackendStatus:
    """One backend of `sparse_attention`, for one kind of call.

    Attributes:
        name: how to ask for it.
        available: whether it computes such a call on this machine.
        reason: why it does not, in one sentence; empty where it does.
        chosen: whether `backend="auto"` takes it for such a call.
    """

    name: str
    available: bool
    reason: str
    chosen: bool


def backend_status(
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    head_dim: int = 128,
) -> tuple[BackendStatus, ...]:
    """Return what each backend can compute here and why not, in the order "auto" tries them.

    The call asked about is a sparse one of whole tiles and blocks, which every backend takes if it
    runs at all. Asking about a GPU may load compiled kernels, or build them.

    Args:
        device: where query, key and value are; the GPU if there is one, else the CPU, by default.
        dtype: of query, key and value; bf16 on a GPU and fp32 elsewhere by default.
        head_dim: channels of each head.

    Returns:
        One status per backend.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = torch.empty(1, 1, 256, head_dim, device=device, dtype=dtype)
    starts = torch.zeros(1, 1, 2, 1, device=device, dtype=torch.int32)
    plan = SparsePlan(
        query_length=256,
        key_length=256,
        run_starts=starts,
        run_lengths=torch.full_like(starts, 128),
    )
    reasons = {
        name: backend.unsupported(rows, rows, rows, plan) or ""
        for name, backend in BACKENDS.items()
    }
    chosen = next((name for name in AUTO_BACKENDS if not reasons[name]), None)
    return tuple(
        BackendStatus(name=name, available=not reason, reason=reason, chosen=name == chosen)
        for name, reason in reasons.items()
    )
