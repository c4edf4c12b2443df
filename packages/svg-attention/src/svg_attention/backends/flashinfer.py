"""FlashInfer's variable-block attention: what Sparse VideoGen 2 runs on. Asked for by name only."""

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

HEAD_DIMS = (64, 128, 256)
# Scratch that FlashInfer is lent, in bytes.
WORKSPACE = 2**30


class FlashInferBackend:
    """Cut runs into key blocks per head and attend with FlashInfer's kernel; needs `flashinfer`.

    It takes any plan without a summary, but waits for the device: FlashInfer plans on the host and
    lists every key of every tile. It returns no log-sum-exp. Its kernel is compiled at first use,
    which takes minutes.
    """

    name = "flashinfer"

    def unsupported(
        self, query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan
    ) -> str | None:
        """Return one sentence saying why this call cannot run here, or None if it can."""
        reason = not_on_cuda(query, (8, 0))
        if reason:
            return reason
        if importlib.util.find_spec("flashinfer") is None:
            return "flashinfer is not installed; pip install flashinfer-python"
        reason = not_half_precision(query, value, HEAD_DIMS)
        if reason:
            return reason
        if plan.summary is not None:
            return "a plan with a summary weighs its centroids, which FlashInfer cannot"
        return None

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
        query, key, value = in_plan_order(query, key, value, plan)
        mask, rows, columns = key_blocks(plan)
        sparse: Any = importlib.import_module("flashinfer").sparse
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=query.device)
        wrapper = sparse.VariableBlockSparseAttentionWrapper(workspace)
        sequences = mask.shape[0]
        wrapper.plan(
            mask,
            rows,
            columns,
            sequences,
            sequences,
            query.shape[-1],
            sm_scale=scale,
            q_data_type=query.dtype,
            kv_data_type=key.dtype,
        )
        flat = [x.reshape(-1, *x.shape[2:]) for x in (query, key, value)]
        found = clear_empty_rows(wrapper.run(*flat).reshape(query.shape), plan)
        token_ordered(found, plan, out)
        return None


def key_blocks(plan: SparsePlan) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the keys of each head where any of its runs begins or ends.

    Waits for the device, to learn how many blocks there are.

    Args:
        plan: any plan; heads of all batch items follow each other in the result.

    Returns:
        Which blocks each tile reads, bool `[B * H, T, C]`; the query rows of the tiles, int32
        `[B * H, T]`; the keys of the blocks, int32 `[B * H, C]`, 0 past the last block of a head.
    """
    starts, lengths = (x.flatten(0, 1).long() for x in (plan.run_starts, plan.run_lengths))
    ends = starts + lengths
    sequences, tiles, _ = starts.shape
    keys = plan.key_length
    marks = torch.zeros(sequences, keys + 1, dtype=torch.bool, device=plan.device)
    marks[:, 0] = marks[:, keys] = True
    for edges in (starts, ends):
        # Unused slots begin and end at key 0, which is an edge anyway.
        marks.scatter_(1, edges.flatten(1), True)
    counts = marks.sum(dim=-1, keepdim=True)
    most = int(counts.max())
    position = marks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :most]
    place = torch.arange(most, device=plan.device)
    position = torch.where(place < counts, position, keys)
    block = (marks.cumsum(dim=-1) - 1)[:, None].expand(-1, tiles, -1)
    change = torch.zeros(sequences, tiles, most, dtype=torch.int32, device=plan.device)
    used = (lengths > 0).to(torch.int32)
    change.scatter_add_(2, block.gather(2, starts), used)
    change.scatter_add_(2, block.gather(2, ends), -used)
    mask = change.cumsum(dim=-1)[..., :-1] > 0
    first = torch.arange(tiles, device=plan.device) * plan.tile_rows
    rows = (plan.query_length - first).clamp(max=plan.tile_rows).to(torch.int32)
    return mask, rows.expand(sequences, tiles).contiguous(), position.diff(dim=-1).to(torch.int32)
