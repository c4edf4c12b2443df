"""Cosmos 1.0, Predict2 and Predict2.5: one norm per head, channels rotated in halves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from svg_attention import Schedule
from svg_models.families.base import Family, patch_grid
from svg_models.families.blocks import COSMOS_BLOCKS
from svg_models.families.processors import VideoProcessor
from svg_models.families.published import Published
from svg_models.families.sharing import STATES, TABLE, TABLES, Sharing
from svg_models.families.steps import PER_HEAD_IN_HALVES, Values, make_heads, project_qkv

__all__ = ["COSMOS", "SparseCosmosProcessor"]


class SparseCosmosProcessor(VideoProcessor):
    """Self-attention of a Cosmos block."""

    def prepare(
        self, attn: Any, hidden_states: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Values]:
        """Split the heads, normalise each, rotate the halves of its channels into each other."""
        norms, projected = (attn.norm_q, attn.norm_k), project_qkv(attn, hidden_states)
        return make_heads(PER_HEAD_IN_HALVES, attn.heads, norms, projected, rotation)


def task(transformer: Any) -> str:
    """Return what the checkpoint was trained for; to continue a clip takes one more channel."""
    config = transformer.config
    return "i2v" if config.in_channels > config.out_channels else "t2v"


# Where frames are given, each token is at the step of its frame.
_BY_TOKEN = {"embedded_timestep": {3: 1}, "temb": {3: 1}}

COSMOS = Family(
    name="cosmos",
    title="Cosmos 1.0, Predict2 and Predict2.5",
    transformers=("CosmosTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    original_processors=("CosmosAttnProcessor2_0",),
    processor=SparseCosmosProcessor,
    blocks=COSMOS_BLOCKS,
    grid=patch_grid,
    sharing=Sharing(
        rotation=TABLE,
        inputs={
            r"transformer_blocks\.0": STATES,
            r"transformer_blocks\.\d+": {**_BY_TOKEN, "controlnet_residual": {3: 1}},
            "norm_out": _BY_TOKEN,
        },
        outputs={"rope": TABLES, "learnable_pos_embed": {0: {3: 1}}},
    ),
    task=task,
    checkpoints=(
        "nvidia/Cosmos-1.0-Diffusion-7B-Text2World",
        "nvidia/Cosmos-1.0-Diffusion-7B-Video2World",
        "nvidia/Cosmos-1.0-Diffusion-14B-Text2World",
        "nvidia/Cosmos-1.0-Diffusion-14B-Video2World",
        "nvidia/Cosmos-Predict2-2B-Video2World",
        "nvidia/Cosmos-Predict2-14B-Video2World",
        "nvidia/Cosmos-Predict2.5-2B",
        "nvidia/Cosmos-Predict2.5-14B",
    ),
    recipes=(
        Published(
            title="Cosmos 1.0 14B Text2World, 704 x 1280, 121 frames, 35 steps",
            task="t2v",
            tokens=56_320,
            schedule=Schedule(dense_steps=0.3, dense_layers=0.03),
            q_clusters=400,
            k_clusters=1000,
            svg1_density=0.25,
            source="Sparse-VideoGen 5ce7b01, scripts/cosmos/cosmos_t2v_sap.sh and _svg.sh",
            width=5120,
        ),
    ),
)
