"""FlashAttention 4: dense, and over blocks of 128 x 128 keys. Asked for by name only."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from svg_attention.backends.blocks import (
    clear_empty_rows,
    in_plan_order,
    not_half_precision,
    not_on_cuda,
    token_ordered,
)
from svg_attention.plan import SparsePlan

HEAD_DIMS = (64, 128)
BLOCK = 128


class FlashAttentionBackend:
    """Attend with FlashAttention 4 where a plan is full or made of blocks of 128 keys.

    Needs `flash-attn-4`. Whether runs are whole blocks is read from the device, so asking for this
    backend waits for it. Kernels are compiled at first use.
    """

    name = "flash_attn"

    def unsupported(
        self, query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan
    ) -> str | None:
        """Return one sentence saying why this call cannot run here, or None if it can."""
        reason = not_on_cuda(query, (9, 0))
        if reason:
            return reason
        if not installed():
            return "flash_attn.cute is not installed; pip install flash-attn-4"
        return not_half_precision(query, value, HEAD_DIMS) or not_in_blocks(plan)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: SparsePlan,
        out: Tensor,
        *,
        scale: float,
        return_lse: bool,
    ) -> Tensor | None:
        """Fill `out` as `plan` says; see `Backend.attend`."""
        interface: Any = importlib.import_module("flash_attn.cute.interface")
        if plan.is_full:
            # The order of keys changes nothing, and that of queries only where rows go.
            tokens_first = [x.transpose(1, 2) for x in (query, key, value)]
            found, lse = interface.flash_attn_func(
                *tokens_first, softmax_scale=scale, return_lse=True
            )
            out.copy_(found.transpose(1, 2))
            return lse
        query, key, value = in_plan_order(query, key, value, plan)
        sparsity: Any = importlib.import_module("flash_attn.cute.block_sparsity")
        counts, index = block_lists(plan)
        operand = sparsity.BlockSparseTensorsTorch(
            mask_block_cnt=torch.zeros_like(counts),
            mask_block_idx=torch.zeros_like(index),
            full_block_cnt=counts,
            full_block_idx=index,
            block_size=(plan.tile_rows, BLOCK),
        )
        found, lse = interface.flash_attn_func(
            *(x.transpose(1, 2) for x in (query, key, value)),
            softmax_scale=scale,
            block_sparse_tensors=operand,
            return_lse=True,
        )
        token_ordered(clear_empty_rows(found.transpose(1, 2), plan), plan, out)
        return token_ordered(clear_empty_rows(lse, plan, -torch.inf), plan)


def installed() -> bool:
    """Return whether FlashAttention 4 can be imported; older versions have no `cute`."""
    if importlib.util.find_spec("flash_attn") is None:
        return False
    return importlib.util.find_spec("flash_attn.cute") is not None


def not_in_blocks(plan: SparsePlan) -> str | None:
    """Return why a plan is neither full nor made of whole blocks of keys, or None if it is.

    Waits for the device unless the plan is full.
    """
    if plan.summary is not None:
        return "a plan with a summary weighs its centroids, which FlashAttention cannot"
    if plan.is_full:
        if plan.key_lengths is not None:
            return "keys are padded; cut the padding off or use another backend"
        return None
    if plan.tile_rows != BLOCK or plan.key_length % BLOCK or plan.query_length % BLOCK:
        return (
            f"tiles must have {BLOCK} rows, and queries and keys be whole blocks of {BLOCK}; got "
            f"{plan.tile_rows}, {plan.query_length} and {plan.key_length}"
        )
    ragged = (plan.run_starts % BLOCK != 0) | (plan.run_lengths % BLOCK != 0)
    if bool(ragged.any()):
        return f"every run must begin and end at a multiple of {BLOCK} keys, and this plan's do not"
    return None


def block_lists(plan: SparsePlan) -> tuple[Tensor, Tensor]:
    """List the blocks of 128 keys that each tile reads.

    Args:
        plan: one whose runs are whole blocks.

    Returns:
        How many, int32 `[B, H, T]`, and which, ascending, int32 `[B, H, T, blocks]`; entries past
        a tile's own are blocks that it does not read.
    """
    starts, ends = plan.run_starts // BLOCK, (plan.run_starts + plan.run_lengths) // BLOCK
    blocks = plan.key_length // BLOCK
    shape = (*starts.shape[:3], blocks + 1)
    change = torch.zeros(shape, dtype=torch.int32, device=plan.device)
    used = (plan.run_lengths > 0).to(torch.int32)
    change.scatter_add_(-1, starts.long(), used)
    change.scatter_add_(-1, ends.long(), -used)
    read = change.cumsum(dim=-1)[..., :blocks] > 0
    index = read.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return read.sum(dim=-1, dtype=torch.int32), index.to(torch.int32)
