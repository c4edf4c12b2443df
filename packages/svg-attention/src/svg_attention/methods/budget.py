"""Turning the density of a plan into keys that each video tile may read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svg_attention.layout import TokenLayout
from svg_attention.tiles import TILE_ROWS


def key_budget(
    layout: TokenLayout,
    text_lengths: Tensor | None,
    density: float,
    like: Tensor,
    rows: int | None = None,
) -> Tensor:
    """Return how many video keys a video tile may read for a plan of this density.

    Text rows read everything, and so does a tile that holds one; every row reads the text. What is
    left of `density * tokens ** 2` pairs is shared equally by the other video rows.

    Args:
        layout: where the tokens are.
        text_lengths: integers `[B]`, valid text tokens; None for all.
        density: fraction of all valid pairs.
        like: a tensor on the device.
        rows: video rows that share it, if probes are among them; the video tokens when None.

    Returns:
        fp64 `[B]`, or `[1]` for all text, between 0 and the video tokens.
    """
    most = float(layout.video_tokens)
    rows = layout.video_tokens if rows is None else rows
    if text_lengths is None:
        keys = min(max(_keys_left(layout, layout.text_tokens, density, rows), 0.0), most)
        return torch.full((1,), keys, dtype=torch.float64, device=like.device)
    text = text_lengths.to(like.device, torch.float64).clamp(0, layout.text_tokens)
    return _keys_left(layout, text, density, rows).clamp(min=0.0, max=most)


def _keys_left(layout: TokenLayout, text: Any, density: float, rows: int) -> Any:
    """Return the keys of a row when text has taken its pairs; `text` is a number or fp64 `[B]`."""
    tokens = layout.video_tokens + text
    # These video rows are in one tile with text.
    shared = (text > 0) * (rows % TILE_ROWS)
    free = rows - shared
    pairs = density * tokens**2 - (text + shared) * tokens
    return pairs / (free + (free == 0)) - text
