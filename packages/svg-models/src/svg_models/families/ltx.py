"""LTX-Video: rotated before the heads are split, its tokens handed over in one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb
from torch import Tensor

from svg_models.families.base import Family
from svg_models.families.blocks import LTX_BLOCKS
from svg_models.families.processors import VideoProcessor
from svg_models.families.sharing import IN_A_ROW
from svg_models.families.steps import Values, project_qkv, split_heads

__all__ = ["LTX", "SparseLTXProcessor"]


class SparseLTXProcessor(VideoProcessor):
    """Self-attention of an LTX block."""

    def prepare(
        self, attn: Any, hidden_states: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Values]:
        """Normalise and rotate over all heads at once, then split them."""
        query, key, values = project_qkv(attn, hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotation is not None:
            query, key = apply_rotary_emb(query, rotation), apply_rotary_emb(key, rotation)
        query, key = split_heads(query, attn.heads), split_heads(key, attn.heads)
        return query, key, lambda: split_heads(values(), attn.heads)


def grid(transformer: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the token grid that the pipeline passes in numbers, or by a coordinate a token."""
    coordinates = arguments.get("video_coords")
    if coordinates is not None:
        return grid_of(coordinates[0])
    return arguments["num_frames"], arguments["height"], arguments["width"]


def grid_of(coordinates: Tensor) -> tuple[int, int, int]:
    """Return the grid of the tokens from the first at time 0 on; before it stand conditions.

    Args:
        coordinates: time, row and column of each token, `[3, S]`. They are looked at on the host.

    Raises:
        ValueError: if these tokens are no grid.
    """
    times, rows, columns = coordinates.float().cpu()
    begin = int(times.argmin())  # of several, the first
    sides = [values[begin:].unique() for values in (rows, columns)]
    frames = times[begin :: len(sides[0]) * len(sides[1])]
    clip = torch.stack((times, rows, columns))[:, begin:]
    expected = torch.cartesian_prod(frames, *sides).T
    if not (frames.diff() > 0).all() or not torch.equal(clip, expected):
        raise ValueError(
            "this pipeline gives the tokens of LTX-Video coordinates that are no grid of frames, "
            "rows and columns; LTXPipeline, LTXImageToVideoPipeline and LTXConditionPipeline do"
        )
    return len(frames), len(sides[0]), len(sides[1])


LTX = Family(
    name="ltx",
    title="LTX-Video",
    transformers=("LTXVideoTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    original_processors=("LTXVideoAttnProcessor",),
    processor=SparseLTXProcessor,
    blocks=LTX_BLOCKS,
    grid=grid,
    sharing=IN_A_ROW,
    conditions="first",
    checkpoints=("Lightricks/LTX-Video", "Lightricks/LTX-Video-0.9.7-dev"),
)
