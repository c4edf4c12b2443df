"""The baseline of quality tables: blocks of keys chosen at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from svg_attention import config
from svg_attention.methods.base import Method
from svg_attention.methods.budget import key_budget
from svg_attention.methods.call import AttentionCall
from svg_attention.plan import SparsePlan
from svg_attention.tiles import TILE_ROWS, count_tiles


@dataclass(frozen=True, kw_only=True, repr=False)
class RandomBlocks(Method):
    """Read blocks of 128 neighbouring keys drawn at random for each query tile.

    A method has to beat it at equal density.

    Args:
        density: fraction of the valid query-key pairs to compute.
    """

    density: float = 0.3

    def __post_init__(self) -> None:
        config.assign(self, density=config.fraction("density", self.density))

    @property
    def is_full(self) -> bool:
        """Whether the density is 1."""
        return self.density >= 1.0

    def build(self, call: AttentionCall) -> SparsePlan:
        """Draw the plan."""
        layout, batch, heads, device = call.layout, call.batch, call.heads, call.device
        tiles = count_tiles(layout.video_tokens)
        first = torch.arange(tiles, device=device) * TILE_ROWS
        sizes = (layout.video_tokens - first).clamp(max=TILE_ROWS)
        # One draw for the whole batch: an item's plan does not depend on its company.
        share = call.head_share
        shape = (heads if share is None else share.heads, tiles, tiles + 1)
        draw = torch.rand(shape, generator=call.generator, device=device)
        if share is not None:
            draw = draw[share.first : share.first + heads]
        order = draw[..., :-1].argsort(dim=-1)
        ranked = sizes.expand_as(order).gather(-1, order)
        # The block that crosses the budget is kept as often as meets the budget on average.
        budget = key_budget(layout, call.text_lengths, self.density, call.query).expand(batch)
        budget = budget[:, None, None, None]
        kept = ranked.cumsum(dim=-1) - ranked * (1.0 - draw[..., -1:]) < budget
        kept[..., 0] = True
        mask = torch.zeros_like(kept).scatter_(-1, order.expand_as(kept), kept)
        valid = call.valid_tokens()
        return SparsePlan.from_cluster_mask(
            torch.nn.functional.pad(mask, (0, 0, 0, count_tiles(layout.tokens) - tiles)),
            sizes.expand(batch, heads, tiles),
            query_length=layout.tokens,
            key_length=layout.tokens,
            query_order=call.token_order(None, heads),
            key_order=call.token_order(None, call.key.shape[1]),
            tail=call.text_rows(),
            full_tiles=call.full_tiles(),
            query_lengths=valid,
            key_lengths=valid,
        ).ready()
