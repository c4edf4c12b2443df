"""The key band of SVG1 in closed form: which keys a query tile reads, and how wide it must be.

Positions count the video tokens of a head's own order: frame-major for a spatial head,
token-major (`patch * num_frames + frame`) for a temporal one. A tile of query positions
`[a, b)` reads the keys at positions `[a - width, b + width)`, the first frame and the text; a tile
that holds a text row reads everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from svg_attention.layout import TokenLayout
from svg_attention.methods.call import text_tiles
from svg_attention.planning.segments import merge_segments
from svg_attention.tiles import TILE_ROWS, count_tiles


@dataclass(frozen=True, kw_only=True, eq=False)
class Band:
    """The keys that the tiles of a spatial or of a temporal head read.

    Attributes:
        layout: where the tokens are.
        temporal: whether positions are token-major.
        text: integers `[B]`, valid text tokens.
        width: int64 `[B]`, keys read on either side of a tile.
    """

    layout: TokenLayout
    temporal: bool
    text: Tensor
    width: Tensor

    @cached_property
    def window(self) -> tuple[Tensor, Tensor]:
        """The first and one past the last video position each tile reads, `[B, T]`."""
        first, end = tile_bounds(self.layout, self.text.device)
        low, high = widen(self.layout, first, end, self.width[:, None])
        full = text_tiles(self.layout, self.text)
        return low.masked_fill(full, 0), high.masked_fill(full, self.layout.video_tokens)

    def reads(self, rows: Tensor) -> Tensor:
        """Return which keys given video rows read: bool `[B, N, tokens]`, keys in token order.

        Args:
            rows: int64 `[N]`, video tokens.
        """
        layout = self.layout
        tile = video_position(layout, rows, temporal=self.temporal) // TILE_ROWS
        low, high = (edge[:, tile, None] for edge in self.window)
        token = torch.arange(layout.video_tokens, device=rows.device)
        position = video_position(layout, token, temporal=self.temporal)
        video = (token < layout.frame_tokens) | ((position >= low) & (position < high))
        text = torch.arange(layout.text_tokens, device=rows.device) < self.text[:, None, None]
        parts = [video, text.expand(-1, len(rows), -1)]
        return torch.cat(parts[::-1] if layout.text_position == "first" else parts, dim=-1)


def video_position(layout: TokenLayout, token: Tensor, *, temporal: bool) -> Tensor:
    """Return where a head's order puts video tokens."""
    if not temporal:
        return token
    return token % layout.frame_tokens * layout.num_frames + token // layout.frame_tokens


def head_order(layout: TokenLayout, temporal: Tensor, *, sink_first: bool = False) -> Tensor:
    """Return the order of the video tokens of each head.

    Args:
        layout: where the tokens are.
        temporal: bool `[B, H]`, which heads are token-major; the others are frame-major.
        sink_first: put the first frame before everything else.

    Returns:
        int32 `[B, H, video_tokens]`.
    """
    frames = layout.num_frames
    place = torch.arange(layout.video_tokens, dtype=torch.int32, device=temporal.device)
    frame, patch = place % frames, place // frames
    if sink_first and frames > 1:
        rest = place - layout.frame_tokens
        frame, patch = rest % (frames - 1) + 1, rest // (frames - 1)
    token_major = frame * layout.frame_tokens + patch
    if sink_first:
        token_major = torch.where(place < layout.frame_tokens, place, token_major)
    return torch.where(temporal[..., None], token_major, place)


def tile_bounds(layout: TokenLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the video positions `[first, end)` of every tile, int64 `[T]`."""
    first = torch.arange(count_tiles(layout.tokens), device=device) * TILE_ROWS
    first = first.clamp(max=layout.video_tokens)
    return first, (first + TILE_ROWS).clamp(max=layout.video_tokens)


def widen(layout: TokenLayout, first: Tensor, end: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Widen tiles by `width` positions on either side; a tile without video rows stays empty."""
    low = (first - width).clamp(min=0)
    high = (end + width).clamp(max=layout.video_tokens)
    return torch.where(first < end, low, 0), torch.where(first < end, high, 0)


def keys_before(layout: TokenLayout, position: Tensor, *, temporal: bool) -> Tensor:
    """Count the keys outside the first frame that stand before a video position."""
    if temporal:
        return position - (position + layout.num_frames - 1) // layout.num_frames
    return (position - layout.frame_tokens).clamp(min=0)


def solve_width(layout: TokenLayout, *, temporal: bool, text: Tensor, density: float) -> Tensor:
    """Compute the band width whose plan has the density asked for.

    Counts the pairs of every width that is a multiple of a tile, first frame, text and tile
    rounding included, and interpolates. The narrowest band, a tile's own positions, may already
    be denser than asked.

    Args:
        layout: where the tokens are.
        temporal: which order the positions have.
        text: integers `[B]`, valid text tokens.
        density: fraction of all valid pairs.

    Returns:
        int64 `[B]`.
    """
    first, end = tile_bounds(layout, text.device)
    widths = torch.arange(count_tiles(layout.video_tokens) + 1, device=text.device) * TILE_ROWS
    low, high = widen(layout, first, end, widths[:, None])
    full = text_tiles(layout, text)[:, None]
    low, high = low.masked_fill(full, 0), high.masked_fill(full, layout.video_tokens)
    before = [keys_before(layout, edge, temporal=temporal) for edge in (low, high)]
    read = before[1] - before[0] + layout.frame_tokens
    pairs = (read * (end - first)).sum(dim=-1).double()
    tokens = (layout.video_tokens + text).double()
    wanted = density * tokens**2 - text * (tokens + layout.video_tokens)
    above = torch.searchsorted(pairs, wanted[:, None]).clamp(1, pairs.shape[-1] - 1)
    lower, upper = pairs.gather(-1, above - 1), pairs.gather(-1, above)
    blend = ((wanted[:, None] - lower) / (upper - lower).clamp(min=1)).clamp(0, 1)
    return ((above - 1 + blend) * TILE_ROWS).round().long().squeeze(-1)


def band_runs(bands: tuple[Band, ...], temporal: Tensor) -> tuple[Tensor, Tensor]:
    """Return the runs of every tile in the key order that has the first frame in front.

    Args:
        bands: the spatial and the temporal band.
        temporal: bool `[B, H]`.

    Returns:
        `(run_starts, run_lengths)`, int32 `[B, H, T, 3]`: first frame, band and text, merged where
        they touch.
    """
    layout, text = bands[0].layout, bands[0].text
    first, _ = tile_bounds(layout, text.device)
    full = text_tiles(layout, text)
    video = (first < layout.video_tokens) | full
    segments = []
    for band in bands:
        low, high = (
            keys_before(layout, edge, temporal=band.temporal) + layout.frame_tokens
            for edge in band.window
        )
        sink = torch.zeros_like(low), torch.full_like(low, layout.frame_tokens)
        start = torch.full_like(low, layout.video_tokens)
        tail = start, start + text[:, None]
        segments.append(
            [torch.stack(edge, dim=-1) for edge in zip(sink, (low, high), tail, strict=False)]
        )
    starts, ends = (
        torch.where(temporal[:, :, None, None], later[:, None], earlier[:, None])
        for earlier, later in zip(*segments, strict=True)
    )
    return merge_segments(starts, ends, video[:, None, :, None], slots=3)
