"""Allegro: no norms, each third of a head rotated by one axis of the grid."""

from __future__ import annotations

from typing import Any

from diffusers.models.embeddings import apply_rotary_emb_allegro
from torch import Tensor

from svg_models.families.base import Family, patch_grid
from svg_models.families.dense import torch_attention
from svg_models.families.processors import VideoProcessor
from svg_models.families.sharing import STATES, Sharing
from svg_models.families.steps import Values, project_qkv, split_heads

__all__ = ["ALLEGRO", "SparseAllegroProcessor"]


class SparseAllegroProcessor(VideoProcessor):
    """Self-attention of an Allegro block."""

    rotation_name = "image_rotary_emb"

    def prepare(
        self, attn: Any, hidden_states: Tensor, rotation: Any
    ) -> tuple[Tensor, Tensor, Values]:
        """Split the heads and rotate them by tables and places of the tokens in them."""
        query, key, values = project_qkv(attn, hidden_states)
        query, key = split_heads(query, attn.heads), split_heads(key, attn.heads)
        if rotation is not None:  # the original function takes heads first
            query, key = (
                apply_rotary_emb_allegro(x.transpose(1, 2), *rotation).transpose(1, 2)
                for x in (query, key)
            )
        return query, key, lambda: split_heads(values(), attn.heads)


ALLEGRO = Family(
    name="allegro",
    title="Allegro",
    transformers=("AllegroTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    original_processors=("AllegroAttnProcessor2_0",),
    processor=SparseAllegroProcessor,
    grid=patch_grid,
    sharing=Sharing(
        rotation={2: 1},  # places of the tokens in tables of their axes, which stay whole
        inputs={"": {"image_rotary_emb": {2: 1}}, r"transformer_blocks\.0": STATES},
    ),
    usual=lambda transformer: {"frames": 85, "fps": 15},  # 22 latent frames
    checkpoints=("rhymes-ai/Allegro",),
    dense=torch_attention,
)
