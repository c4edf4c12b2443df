"""The compiled and the portable GPU kernel of `svg_kernels`, behind one backend each."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from svg_attention.plan import SparsePlan, match_heads

# Tiles that read this many times what their head's tiles read on average are started first.
LONG = 1.5
# Rows that the copy engine moves at once: runs of a multiple need no mask in the compiled kernel.
COPY_ROWS = 8


class KernelsBackend:
    """Permute keys and values once, then attend run by run in one kernel; needs `svg_kernels`.

    Queries are gathered and outputs scattered inside the kernel. Nothing waits for the device.

    Attributes:
        name: "cuda" for the kernel written for compute capability 9.0, "triton" for the one that
            runs from 8.0 on.
    """

    def __init__(self, name: Literal["cuda", "triton"]) -> None:
        self.name = name

    def unsupported(
        self, query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan
    ) -> str | None:
        """Return one sentence saying why this call cannot run here, or None if it can."""
        if query.device.type != "cuda":
            return f"needs tensors on a CUDA device, these are on {query.device.type!r}"
        if importlib.util.find_spec("svg_kernels") is None:
            return "svg-kernels is not installed; pip install 'svg-attention[kernels]'"
        from svg_kernels.attention import TILE_ROWS, unsupported

        if plan.tile_rows != TILE_ROWS:
            return f"tiles must have {TILE_ROWS} query rows, this plan's have {plan.tile_rows}"
        if value.shape[-1] != key.shape[-1]:
            return (
                "values must have the head_dim of the keys, "
                f"got {value.shape[-1]} and {key.shape[-1]}"
            )
        return unsupported(self.name, query.device, query.dtype, query.shape[-1])

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: SparsePlan,
        *,
        scale: float,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention as `plan` says; see `Backend.run`."""
        import svg_kernels

        if plan.key_order is not None:
            order = match_heads(plan.key_order, key.shape[1])
            key, value = svg_kernels.permute_rows((key, value), order)
        summary = None
        if plan.summary is not None:
            summary = (
                match_heads(plan.summary.keys, key.shape[1]),
                match_heads(plan.summary.values, key.shape[1]),
                plan.summary.log_weights,
            )
        elif self.name == "cuda" and not plan.is_full:
            plan = plan.rounded(COPY_ROWS)
        result: Tensor | tuple[Tensor, Tensor] = svg_kernels.block_sparse_attention(
            query,
            key,
            value,
            plan.run_starts,
            plan.run_lengths,
            query_order=plan.query_order,
            summary=summary,
            tile_order=None if plan.is_full else long_tiles_first(plan.run_lengths),
            scale=scale,
            return_lse=return_lse,
            backend=self.name,
        )
        return (result, None) if isinstance(result, Tensor) else result


def long_tiles_first(run_lengths: Tensor) -> Tensor:
    """Order tiles head by head, those that read much more than their head's average first.

    A tile of text rows reads every key; started last, it would run on alone. The others keep
    their order: neighbours read similar keys, which are then still in the cache.

    Args:
        run_lengths: int32 `[B, H, T, R]`.

    Returns:
        int32 `[B * H * T]`, tile numbers in the order to start them.
    """
    rows = run_lengths.sum(dim=-1, dtype=torch.float32).flatten(0, 1)
    short = rows <= LONG * rows.mean(dim=-1, keepdim=True)
    order = short.to(torch.uint8).argsort(dim=-1, stable=True)
    heads, tiles = rows.shape
    return (order + torch.arange(heads, device=order.device)[:, None] * tiles).view(-1).int()
