"""CogVideoX 1.0 and 1.5: text before the video, all of it valid, one norm for each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from svg_attention import Schedule
from svg_models.families.base import Family
from svg_models.families.blocks import COGVIDEOX_BLOCKS
from svg_models.families.dense import torch_attention
from svg_models.families.processors import JointProcessor
from svg_models.families.published import Published
from svg_models.families.sharing import STATES, TABLE, Sharing
from svg_models.families.steps import PER_HEAD, Values, make_heads, project_out, project_qkv

__all__ = ["COGVIDEOX", "SparseCogVideoXProcessor"]


class SparseCogVideoXProcessor(JointProcessor):
    """Joint attention of text and video in one stream."""

    def prepare(
        self, attn: Any, video: Tensor, text: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Values]:
        """Normalise each head of the joined tokens; 1.0 for text has no rotation."""
        projected = project_qkv(attn, text, video)
        return make_heads(
            PER_HEAD,
            attn.heads,
            (attn.norm_q, attn.norm_k),
            projected,
            rotation,
            text_before=text.shape[1],
        )

    def finish(self, attn: Any, states: Tensor, text: int) -> tuple[Tensor, Tensor]:
        """Part text from the beginning."""
        states = project_out(attn, states)
        return states[:, text:], states[:, :text]


def grid(transformer: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the token grid of `[B, F, C, H, W]` latents; the patches of 1.5 span frames, too."""
    frames, _, rows, columns = arguments["hidden_states"].shape[1:]
    config = transformer.config
    frames = -(-frames // (config.get("patch_size_t") or 1))
    return frames, rows // config.patch_size, columns // config.patch_size


def task(transformer: Any) -> str:
    """Return what the checkpoint was trained for; one for image-to-video takes more channels."""
    return "i2v" if transformer.config.in_channels > transformer.config.out_channels else "t2v"


def usual(transformer: Any) -> dict[str, Any]:
    """Return size and frame rate: 1.0 makes six seconds of 8 frames, 1.5 five of 16."""
    config = transformer.config
    first = config.get("patch_size_t") is None
    return {
        "height": config.sample_height * 8,
        "width": config.sample_width * 8,
        "frames": 49 if first else 81,
        "fps": 8 if first else 16,
        "one_size": first,
    }


_SOURCE = (
    "Sparse-VideoGen 5ce7b01, defaults of cog_inference.py for SVG; the cluster counts are those "
    "of Wan 2.1 image-to-video at 480p, since none were published for this model"
)

COGVIDEOX = Family(
    name="cogvideox",
    title="CogVideoX 1.0 and 1.5",
    transformers=("CogVideoXTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    original_processors=("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
    processor=SparseCogVideoXProcessor,
    blocks=COGVIDEOX_BLOCKS,
    grid=grid,
    sharing=Sharing(
        rotation=TABLE,
        inputs={"": {"image_rotary_emb": TABLE}, r"transformer_blocks\.0": STATES},
    ),
    task=task,
    usual=usual,
    checkpoints=(
        "zai-org/CogVideoX-2b",
        "zai-org/CogVideoX-5b",
        "zai-org/CogVideoX-5b-I2V",
        "zai-org/CogVideoX1.5-5B",
        "zai-org/CogVideoX1.5-5B-I2V",
    ),
    text_position="first",
    dense=torch_attention,
    recipes=(
        Published(
            title="CogVideoX 1.5 image-to-video, 768p, 81 frames, 50 steps",
            task="i2v",
            tokens=44_880,
            schedule=Schedule(dense_steps=0.2, dense_layers=0.025),
            q_clusters=200,
            k_clusters=1000,
            svg1_density=0.25,
            source=_SOURCE,
            width=3072,
        ),
    ),
)
