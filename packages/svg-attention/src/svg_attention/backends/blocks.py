"""What the backends that wrap other libraries share."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_attention.plan import SparsePlan


def not_on_cuda(x: Tensor, least: tuple[int, int]) -> str | None:
    """Say why a tensor is on no GPU of at least this compute capability, or None if it is."""
    if x.device.type != "cuda":
        return f"needs tensors on a CUDA device, these are on {x.device.type!r}"
    found = torch.cuda.get_device_capability(x.device)
    if found < least:
        wanted = ".".join(map(str, least))
        return f"needs compute capability {wanted} or newer, this GPU has {found[0]}.{found[1]}"
    return None


def clear_empty_rows(x: Tensor, plan: SparsePlan, fill: float = 0.0) -> Tensor:
    """Put `fill` into the rows of tiles that read nothing.

    Args:
        x: `[B, H, Sq]` or `[B, H, Sq, D]`, in plan order.
        plan: which keys each tile reads.
        fill: what such rows hold.
    """
    empty = (plan.run_lengths == 0).all(dim=-1).repeat_interleave(plan.tile_rows, dim=2)
    empty = empty[:, :, : plan.query_length]
    return x.masked_fill(empty if x.dim() == 3 else empty[..., None], fill)
