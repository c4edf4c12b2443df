"""SVG1: each head is spatial or temporal; one band of keys serves both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svg_attention.layout import TokenLayout
from svg_attention.memory import LayerMemory
from svg_attention.methods.band import Band, band_runs, head_order, solve_width
from svg_attention.methods.base import (
    MethodConfig,
    check_call,
    check_fraction,
    token_order,
    valid_text,
    valid_tokens,
)
from svg_attention.methods.dense import Dense
from svg_attention.plan import SparsePlan
from svg_attention.planning.dispatch import planner_for
from svg_attention.planning.pattern_error import pattern_error
from svg_attention.tiles import match_heads


@dataclass(frozen=True, kw_only=True)
class SVG1(MethodConfig):
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
        check_fraction("density", self.density)
        if self.sampled_rows < 1:
            raise ValueError(f"sampled_rows must be at least 1, got {self.sampled_rows}")

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
        """Profile the heads and build the plan; see `Method.plan`."""
        check_call(query, key, value, layout, text_lengths)
        if self.density >= 1.0:
            return Dense().plan(
                query, key, value, layout=layout, memory=memory, text_lengths=text_lengths
            )
        batch, heads, tokens, width = query.shape
        scale = width**-0.5 if scale is None else scale
        text = valid_text(layout, text_lengths, batch, query)
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
            layout.video_tokens, (self.sampled_rows,), generator=generator, device=query.device
        )
        spatial_error, temporal_error = (
            # Heads that share keys share their order, so they are profiled together.
            error.unflatten(1, (key.shape[1], -1)).mean(dim=-1)
            for error in profile(query, key, value, rows, bands, scale)
        )
        key_temporal = temporal_error < spatial_error
        temporal = match_heads(key_temporal, heads)
        starts, lengths = band_runs(bands, temporal)
        valid = valid_tokens(layout, text_lengths, batch, query)
        return SparsePlan(
            query_length=tokens,
            key_length=tokens,
            query_order=token_order(layout, head_order(layout, temporal), query),
            key_order=token_order(layout, head_order(layout, key_temporal, sink_first=True), key),
            run_starts=starts,
            run_lengths=lengths,
            query_lengths=valid,
            key_lengths=valid,
        )


def profile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    bands: tuple[Band, Band],
    scale: float,
) -> Tensor:
    """Return the mean square error that each of two bands makes on sampled rows: fp32 `[2, B, H]`.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D]`.
        rows: int64 `[N]`, video tokens.
        bands: the spatial and the temporal band.
        scale: factor of the logits.
    """
    layout, text = bands[0].layout, bands[0].text
    place = torch.arange(layout.tokens, device=query.device) - layout.text_start
    padding = (place >= text[:, None]) & (place < layout.text_tokens)
    reads = (~padding[:, None]).byte()
    for bit, band in zip((2, 4), bands, strict=True):
        reads = reads + bit * band.reads(rows).byte()
    sampled = query.index_select(2, rows + layout.video_start)
    planner = planner_for(query)
    return pattern_error(sampled, key, value, reads, scale=scale, backend=planner)
