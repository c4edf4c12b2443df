"""The baseline of quality tables: blocks of keys chosen at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svg_attention.layout import TokenLayout
from svg_attention.memory import LayerMemory
from svg_attention.methods.base import (
    MethodConfig,
    check_call,
    check_fraction,
    full_tiles,
    text_rows,
    token_order,
    valid_tokens,
)
from svg_attention.methods.budget import key_budget
from svg_attention.methods.dense import Dense
from svg_attention.plan import SparsePlan
from svg_attention.tiles import TILE_ROWS, count_tiles


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(MethodConfig):
    """Read blocks of 128 neighbouring keys drawn at random for each query tile.

    Any method worth its name beats it at equal density.

    Args:
        density: fraction of the valid query-key pairs to compute.
    """

    density: float = 0.3

    def __post_init__(self) -> None:
        check_fraction("density", self.density)

    def plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: TokenLayout,
        memory: LayerMemory,
        text_lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
        scale: float | None = None,
    ) -> SparsePlan:
        """Draw the plan; see `Method.plan`."""
        check_call(query, key, value, layout, text_lengths)
        if self.density >= 1.0:
            return Dense().plan(
                query, key, value, layout=layout, memory=memory, text_lengths=text_lengths
            )
        batch, heads, tokens, _ = query.shape
        tiles = count_tiles(layout.video_tokens)
        first = torch.arange(tiles, device=query.device) * TILE_ROWS
        sizes = (layout.video_tokens - first).clamp(max=TILE_ROWS)
        # One draw for the whole batch: an item's plan does not depend on its company.
        draw = torch.rand((heads, tiles, tiles + 1), generator=generator, device=query.device)
        order = draw[..., :-1].argsort(dim=-1)
        ranked = sizes.expand_as(order).gather(-1, order)
        # The block that crosses the budget is kept as often as meets the budget on average.
        budget = key_budget(layout, text_lengths, self.density, query).expand(batch)
        budget = budget[:, None, None, None]
        kept = ranked.cumsum(dim=-1) - ranked * (1.0 - draw[..., -1:]) < budget
        kept[..., 0] = True
        mask = torch.zeros_like(kept).scatter_(-1, order.expand_as(kept), kept)
        return SparsePlan.from_cluster_mask(
            torch.nn.functional.pad(mask, (0, 0, 0, count_tiles(tokens) - tiles)),
            sizes.expand(batch, heads, tiles),
            query_length=tokens,
            key_length=tokens,
            query_order=token_order(layout, None, query),
            key_order=token_order(layout, None, key),
            tail=text_rows(layout, text_lengths, batch, query),
            full_tiles=full_tiles(layout, text_lengths, batch, query),
            query_lengths=valid_tokens(layout, text_lengths, batch, query),
            key_lengths=valid_tokens(layout, text_lengths, batch, query),
        )
