"""The oracle: plain torch, any device, any head size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from svg_attention.backends.blocks import token_ordered
from svg_attention.plan import KeySummary, SparsePlan
from svg_attention.rows import take_rows
from svg_attention.tiles import match_heads

# Keys gathered at once, over all tiles of a group: few enough to stay in a CPU's last-level cache,
# enough to fill a GPU. A single tile may gather more.
GROUP_KEYS = {"cpu": 2**16, "cuda": 2**21}


class ReferenceBackend:
    """Gather what each tile reads and multiply, for groups of tiles with lists of like length.

    The softmax is computed in fp32 over all that a tile reads. Memory is bounded by the group, not
    by the sequence. Reading the lengths of the lists is this backend's one host synchronisation.
    """

    name = "reference"

    def unsupported(
        self, query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan
    ) -> str | None:
        """Return None: every call can run."""
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
        batch, heads, length, width = query.shape
        tiles, rows = plan.tiles, plan.tile_rows
        tiled = plan_ordered_tiles(query, plan)
        if plan.key_order is not None:
            order = match_heads(plan.key_order, key.shape[1])
            key, value = take_rows(key, order), take_rows(value, order)
        # One table of keys and values side by side: a run is read once for both.
        table = torch.cat([key, value], dim=-1).flatten(0, 2)
        first_rows = first_key_rows(plan, key)
        shape = (batch * heads * tiles, rows)
        rows_out = query.new_empty((*shape, value.shape[-1]))
        lse = torch.empty(shape, dtype=torch.float32, device=query.device) if return_lse else None
        starts, lengths = plan.run_starts.flatten(0, 2), plan.run_lengths.flatten(0, 2)
        buffer = table.new_empty(0)
        for items, longest, shortest in groups_of_like_length(lengths):
            positions, bias = read_lists(
                starts[items], lengths[items], longest, ragged=shortest < longest
            )
            buffer.resize_(positions.numel(), table.shape[1])
            index = (positions + first_rows[items, None]).view(-1)
            gathered = torch.index_select(table, 0, index, out=buffer)
            gathered = gathered.view(len(items), longest, -1).float()
            if plan.summary is not None:
                gathered, bias = append_summary(plan, plan.summary, items, gathered, bias)
            queries = tiled[items].float() * scale
            read_keys, read_values = gathered.split([width, value.shape[-1]], dim=-1)
            if query.device.type == "cpu" and lse is None and shortest > 0:
                group_out = attend_fused(queries, read_keys, read_values, bias)
            else:
                group_out, group_lse = attend(queries, read_keys, read_values, bias)
                if lse is not None:
                    lse[items] = group_lse
            rows_out[items] = group_out.to(out.dtype)
        found = rows_out.view(batch, heads, tiles * rows, -1)[:, :, :length]
        token_ordered(found, plan, out)
        if lse is None:
            return None
        return token_ordered(lse.view(batch, heads, tiles * rows)[:, :, :length], plan)


def plan_ordered_tiles(query: Tensor, plan: SparsePlan) -> Tensor:
    """Return the query tiles in plan order, `[B*H*T, tile_rows, D]`; missing rows are zero."""
    if plan.query_order is not None:
        query = take_rows(query, plan.query_order)
    missing = plan.tiles * plan.tile_rows - query.shape[2]
    if missing:
        query = torch.nn.functional.pad(query, (0, 0, 0, missing))
    return query.reshape(-1, plan.tile_rows, query.shape[-1])


def first_key_rows(plan: SparsePlan, key: Tensor) -> Tensor:
    """Return where the keys of each tile's head begin among all key rows: int64 `[B*H*T]`."""
    batch, key_heads, length, _ = key.shape
    base = torch.arange(batch * key_heads, device=key.device).view(batch, key_heads) * length
    return match_heads(base, plan.heads)[..., None].expand(-1, -1, plan.tiles).reshape(-1)


def groups_of_like_length(lengths: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """Split tiles into groups of like list length, longest first, so that little is padding.

    Args:
        lengths: int32 `[N, R]`, run lengths of each tile.

    Yields:
        `(items, longest, shortest)`: tile numbers, and the longest (at least 1) and shortest list
        among them.
    """
    totals = lengths.sum(dim=-1)
    totals, items = totals.sort(descending=True, stable=True)
    sizes = totals.tolist()
    limit = GROUP_KEYS["cpu" if lengths.device.type == "cpu" else "cuda"]
    begin = 0
    while begin < len(sizes):
        longest = max(sizes[begin], 1)
        end = min(begin + max(limit // longest, 1), len(sizes))
        yield items[begin:end], longest, sizes[end - 1]
        begin = end


def read_lists(
    starts: Tensor, lengths: Tensor, longest: int, *, ragged: bool
) -> tuple[Tensor, Tensor | None]:
    """Write out the key positions of each tile.

    Args:
        starts: int32 `[G, R]`.
        lengths: int32 `[G, R]`.
        longest: entries of the result.
        ragged: whether some list is shorter than `longest`.

    Returns:
        Positions, int64 `[G, longest]` (0 past the end of a list), and what to add to the logits,
        fp32 `[G, longest]`: 0, or minus infinity past the end; None when nothing is past it.
    """
    ends = lengths.cumsum(dim=-1)
    place = torch.arange(longest, device=starts.device).expand(len(starts), -1).contiguous()
    run = torch.searchsorted(ends, place, right=True).clamp_(max=starts.shape[-1] - 1)
    positions = place + (starts - ends + lengths).gather(-1, run)
    if not ragged:
        return positions, None
    inside = place < ends[:, -1:]
    bias = torch.zeros(positions.shape, device=starts.device).masked_fill_(~inside, -torch.inf)
    return positions.masked_fill_(~inside, 0), bias


def append_summary(
    plan: SparsePlan, summary: KeySummary, items: Tensor, gathered: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Append the centroids, as further keys with their own weight, to what the tiles read."""
    centroids = torch.cat([summary.keys, summary.values], dim=-1)
    rows = match_heads(centroids, plan.heads).flatten(0, 1)[items // plan.tiles]
    if bias is None:
        bias = torch.zeros(gathered.shape[:2], device=gathered.device)
    weights = summary.log_weights.flatten(0, 2)[items]
    return torch.cat([gathered, rows.float()], dim=1), torch.cat([bias, weights], dim=1)


def attend_fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Compute what `attend` does by torch's own kernel: no logits in memory, no log-sum-exp."""
    mask = None if bias is None else bias[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(
        query[:, None], key[:, None], value[:, None], attn_mask=mask, scale=1.0
    ).squeeze(1)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute softmax attention of `[G, M, D]` queries over `[G, L, D]` keys in fp32.

    Returns the output and the log-sum-exp, `[G, M]`. A row whose logits are all minus infinity
    gives 0 and minus infinity.
    """
    if bias is None:
        logits = torch.bmm(query, key.transpose(1, 2))
    else:
        logits = torch.baddbmm(bias[:, None], query, key.transpose(1, 2))
    largest = logits.amax(dim=-1, keepdim=True)
    largest.masked_fill_(largest == -torch.inf, 0.0)
    weights = logits.sub_(largest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    out = torch.bmm(weights, value) / total.clamp_min(torch.finfo(torch.float32).tiny)
    return out, (total.log() + largest).squeeze(-1)
