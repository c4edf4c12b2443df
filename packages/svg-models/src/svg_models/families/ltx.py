"""LTX-Video: rotated before the heads are split, its tokens handed over in one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_ltx import apply_rotary_emb
from torch import Tensor

from svg_models.families.base import Family
from svg_models.families.blocks import LTX_BLOCKS
from svg_models.families.processors import VideoProcessor
from svg_models.families.steps import project_qkv, split_heads

__all__ = ["LTX", "SparseLTXProcessor"]


class SparseLTXProcessor(VideoProcessor):
    """Self-attention of an LTX block."""

    def prepare(
        self, attn: Any, hidden_states: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise and rotate over all heads at once, then split them."""
        query, key, value = project_qkv(attn, hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotation is not None:
            query, key = apply_rotary_emb(query, rotation), apply_rotary_emb(key, rotation)
        query, key, value = (split_heads(x, attn.heads) for x in (query, key, value))
        return query, key, value


def grid(transformer: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the token grid that the pipeline passes in numbers."""
    if arguments.get("video_coords") is not None:
        raise ValueError(
            "this pipeline gives each token of LTX-Video a coordinate, so there is no grid of "
            "frames, rows and columns; LTXPipeline and LTXImageToVideoPipeline have one"
        )
    return arguments["num_frames"], arguments["height"], arguments["width"]


LTX = Family(
    name="ltx",
    title="LTX-Video",
    transformers=("LTXVideoTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    original_processors=("LTXVideoAttnProcessor",),
    processor=SparseLTXProcessor,
    blocks=LTX_BLOCKS,
    grid=grid,
    checkpoints=("Lightricks/LTX-Video", "Lightricks/LTX-Video-0.9.7-dev"),
)
