"""SVG1: each head is spatial or temporal; one band of keys serves both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svg_attention import config
from svg_attention.methods.band import Band, band_runs, head_order, solve_width
from svg_attention.methods.base import Method
from svg_attention.methods.call import AttentionCall
from svg_attention.plan import SparsePlan
from svg_attention.planning.dispatch import planner_for
from svg_attention.planning.pattern_error import pattern_error
from svg_attention.tiles import match_heads


@dataclass(frozen=True, kw_only=True, repr=False)
class SVG1(Method):
    """Profile each head on sampled rows as spatial or temporal and read a band of keys.

    A spatial head looks at neighbouring frames: a band of keys in frame-major order. A temporal
    head looks at the same place in other frames: a band in token-major order (all frames of a
    patch, then the next patch). Every video query also reads the first frame and the text.

    Args:
        density: fraction of the valid query-key pairs to compute, the first frame and text
            included; the band is made as wide as this allows.
        sampled_rows: video query rows, drawn over the whole clip, that choose between the two.

    Source: Sparse VideoGen, arXiv:2502.01776.
    """

    density: float = 0.3
    sampled_rows: int = 64

    def __post_init__(self) -> None:
        config.assign(
            self,
            density=config.fraction("density", self.density),
            sampled_rows=config.integer("sampled_rows", self.sampled_rows, least=1),
        )

    @property
    def is_full(self) -> bool:
        """Whether the density is 1."""
        return self.density >= 1.0

    def build(self, call: AttentionCall) -> SparsePlan:
        """Profile the heads and build the plan."""
        layout, heads, key_heads = call.layout, call.heads, call.key.shape[1]
        text = call.valid_text()
        spatial_band, temporal_band = (
            Band(
                layout=layout,
                temporal=temporal,
                text=text,
                width=solve_width(layout, temporal=temporal, text=text, density=self.density),
            )
            for temporal in (False, True)
        )
        bands = (spatial_band, temporal_band)
        rows = torch.randint(
            layout.video_tokens, (self.sampled_rows,), generator=call.generator, device=call.device
        )
        # Heads that share keys share their order, so they are profiled together.
        errors = profile(call, rows, bands).unflatten(2, (key_heads, -1)).mean(dim=-1)
        # Where an error is not a number the head counts as spatial, which is as good.
        key_temporal = errors[1] < errors[0]
        temporal = match_heads(key_temporal, heads)
        starts, lengths = band_runs(bands, temporal)
        valid = call.valid_tokens()
        return SparsePlan(
            query_length=layout.tokens,
            key_length=layout.tokens,
            query_order=call.token_order(head_order(layout, temporal), heads),
            key_order=call.token_order(
                head_order(layout, key_temporal, sink_first=True), key_heads
            ),
            run_starts=starts,
            run_lengths=lengths,
            query_lengths=valid,
            key_lengths=valid,
        ).ready()


def profile(call: AttentionCall, rows: Tensor, bands: tuple[Band, Band]) -> Tensor:
    """Return the mean square error that each of two bands makes on sampled rows: fp32 `[2, B, H]`.

    Args:
        call: the call.
        rows: int64 `[N]`, video tokens.
        bands: the spatial and the temporal band.
    """
    layout, text = call.layout, bands[0].text
    place = torch.arange(layout.tokens, device=call.device) - layout.text_start
    padding = (place >= text[:, None]) & (place < layout.text_tokens)
    reads = (~padding[:, None]).byte()
    for bit, band in zip((2, 4), bands, strict=True):
        reads = reads + bit * band.reads(rows).byte()
    sampled = call.query.index_select(2, rows + layout.video_start)
    planner = planner_for(call.query)
    return pattern_error(sampled, call.key, call.value, reads, scale=call.scale, backend=planner)
