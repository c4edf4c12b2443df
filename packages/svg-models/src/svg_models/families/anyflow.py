"""AnyFlow: the attention of Wan with a table of complex numbers, and frames before channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_anyflow import apply_rotary_emb
from torch import Tensor

from svg_models.families.base import Family
from svg_models.families.processors import VideoProcessor
from svg_models.families.steps import ACROSS_HEADS, Values, make_heads, project_qkv
from svg_models.families.wan import task

__all__ = ["ANYFLOW", "SparseAnyFlowProcessor"]


class SparseAnyFlowProcessor(VideoProcessor):
    """Self-attention of a bidirectional AnyFlow block."""

    def prepare(
        self, attn: Any, hidden_states: Tensor, rotation: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, Values]:
        """Normalise over all heads at once, split them, and rotate by the original function."""
        projected = project_qkv(attn, hidden_states)
        norms = (attn.norm_q, attn.norm_k)
        query, key, values = make_heads(ACROSS_HEADS, attn.heads, norms, projected, None)
        if rotation is not None:  # it takes heads first
            query, key = (
                apply_rotary_emb(x.transpose(1, 2), rotation[name]).transpose(1, 2)
                for name, x in (("query", query), ("key", key))
            )
        return query, key, values

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """Compute the attention of one block; the rotation has another name here."""
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
        )


def grid(transformer: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the token grid of `[B, F, C, H, W]` latents; a patch is one frame deep."""
    frames, _, rows, columns = arguments["hidden_states"].shape[1:]
    _, high, wide = transformer.config.patch_size
    return frames, rows // high, columns // wide


ANYFLOW = Family(
    name="anyflow",
    title="AnyFlow, bidirectional",
    transformers=("AnyFlowTransformer3DModel",),
    attentions=r"blocks\.\d+\.attn1",
    original_processors=("AnyFlowAttnProcessor",),
    processor=SparseAnyFlowProcessor,
    grid=grid,
    task=task,
    checkpoints=("nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers",),
)
