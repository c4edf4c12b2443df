"""LTX-2: the video's own attention, beside which sound and video read from each other, densely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffusers.models.transformers.transformer_ltx2 import (
    apply_interleaved_rotary_emb,
    apply_split_rotary_emb,
)
from torch import Tensor

from svg_models.families.base import Family
from svg_models.families.processors import SparseProcessor
from svg_models.families.sharing import IN_A_ROW
from svg_models.families.steps import project_out, project_qkv, split_heads

__all__ = ["LTX2", "SparseLTX2Processor"]

_ROTATIONS = {"interleaved": apply_interleaved_rotary_emb, "split": apply_split_rotary_emb}


class SparseLTX2Processor(SparseProcessor):
    """Self-attention of the video in an LTX-2 block, gated by head in 2.3."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Any = None,
    ) -> Tensor:
        """Compute the attention of one block, `[B, S, C]` in and out."""
        unusual = (encoder_hidden_states, attention_mask, key_rotary_emb, perturbation_mask)
        if any(given is not None for given in unusual) or self.stands_aside():
            perturbed = (
                {} if perturbation_mask is None else {"perturbation_mask": perturbation_mask}
            )
            if perturbed:
                perturbed["all_perturbed"] = all_perturbed
            out: Tensor = self.original(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                query_rotary_emb,
                key_rotary_emb,
                **perturbed,
            )
            return out
        query, key, values = project_qkv(attn, hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if query_rotary_emb is not None:
            rotate = _ROTATIONS[attn.rope_type]
            query, key = rotate(query, query_rotary_emb), rotate(key, query_rotary_emb)
        query, key = split_heads(query, attn.heads), split_heads(key, attn.heads)
        self.begin(query, key)
        value = split_heads(values(), attn.heads)
        attended = self.attend(query, key, value).type_as(query)
        if attn.to_gate_logits is not None:
            attended = attended * (2.0 * attn.to_gate_logits(hidden_states).sigmoid()).unsqueeze(-1)
        return project_out(attn, attended)


def grid(transformer: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the token grid that the pipeline passes in numbers; conditions stand behind it."""
    numbers = arguments.get("num_frames"), arguments.get("height"), arguments.get("width")
    if None in numbers:
        raise ValueError(
            "call LTX-2 with num_frames, height and width of the latents, as its pipelines do; "
            "coordinates alone do not say which tokens are the clip's"
        )
    return numbers  # type: ignore[return-value]


_BLOCK = r"transformer_blocks\.\d+\."
SHARING = replace(
    IN_A_ROW,
    inputs={
        "": {**IN_A_ROW.inputs[""], "video_keyframes_mask": {3: 1}},
        _BLOCK + "audio_to_video_attn": {"query_rotary_emb": {3: 1, 4: 2}},
    },
    # Sound reads from the whole clip.
    whole={_BLOCK + "video_to_audio_attn": ("encoder_hidden_states",)},
)

LTX2 = Family(
    name="ltx2",
    title="LTX-2",
    transformers=("LTX2VideoTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    original_processors=("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
    processor=SparseLTX2Processor,
    grid=grid,
    sharing=SHARING,
    usual=lambda transformer: {"frames": 121, "fps": 24},
    checkpoints=("Lightricks/LTX-2",),
    conditions="last",
)
