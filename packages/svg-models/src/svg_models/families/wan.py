"""Wan and what is built like it: one norm over all heads, neighbouring channels rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from svg_attention import Schedule
from svg_models.families.base import Family, patch_grid
from svg_models.families.blocks import WAN_BLOCKS
from svg_models.families.processors import VideoProcessor
from svg_models.families.published import Published
from svg_models.families.sharing import STATES, Sharing
from svg_models.families.steps import ACROSS_HEADS, Values, make_heads, project_qkv

__all__ = ["SKYREELS", "WAN", "SparseWanProcessor"]


class SparseWanProcessor(VideoProcessor):
    """Self-attention of a Wan block."""

    def prepare(
        self, attn: Any, hidden_states: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Values]:
        """Normalise over all heads at once, then split them and rotate neighbouring channels."""
        projected = project_qkv(attn, hidden_states)
        norms = (attn.norm_q, attn.norm_k)
        return make_heads(ACROSS_HEADS, attn.heads, norms, projected, rotation)


def task(transformer: Any) -> str:
    """Return what the checkpoint was trained for; one for image-to-video takes more channels."""
    config = transformer.config
    takes_image = config.image_dim is not None or config.in_channels > config.out_channels
    return "i2v" if takes_image else "t2v"


def usual(transformer: Any) -> dict[str, Any]:
    """Return size and frame rate of Wan 2.2 5B, which is known by its wide latents."""
    if transformer.config.in_channels != 48:
        return {}
    return {"height": 704, "width": 1280, "frames": 121, "fps": 24}


_SOURCE = "Sparse-VideoGen 5ce7b01, scripts/wan/wan_{}_sap.sh and _svg.sh"
_BOTH = _SOURCE + "; the same clusters for Wan 2.2 A14B in arXiv:2603.08982"

SHARING = Sharing(
    rotation={4: 1},
    inputs={
        "": {"timestep": {2: 1}},  # Wan 2.2 5B may give each token one of its own
        r"(vace_)?blocks\.0": {**STATES, "control_hidden_states": {3: 1}},
    },
    outputs={"rope": {0: {4: 1}, 1: {4: 1}}},
)

WAN = Family(
    name="wan",
    title="Wan 2.1, Wan 2.2 and Wan VACE",
    transformers=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    # VACE computes all its control blocks, over the same tokens, before the first other block.
    attentions=(r"vace_blocks\.\d+\.attn1", r"blocks\.\d+\.attn1"),
    original_processors=("WanAttnProcessor",),
    processor=SparseWanProcessor,
    blocks=WAN_BLOCKS,
    grid=patch_grid,
    sharing=SHARING,
    task=task,
    usual=usual,
    checkpoints=(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        "Wan-AI/Wan2.1-VACE-14B-diffusers",
    ),
    recipes=(
        Published(
            title="Wan 2.1 14B text-to-video, 720p, 81 frames, 50 steps",
            task="t2v",
            tokens=75_600,
            schedule=Schedule(dense_steps=0.2, dense_layers=0.03),
            q_clusters=300,
            k_clusters=1000,
            svg1_density=0.3,
            source=_BOTH.format("t2v_720p"),
            width=5120,
        ),
        Published(
            title="Wan 2.1 14B image-to-video, 720p, 81 frames, 40 steps",
            task="i2v",
            tokens=75_600,
            schedule=Schedule(dense_steps=0.35, dense_layers=0.03),
            q_clusters=300,
            k_clusters=1000,
            svg1_density=0.3,
            source=_BOTH.format("i2v_720p"),
            width=5120,
        ),
        Published(
            title="Wan 2.1 14B image-to-video, 480p, 81 frames, 40 steps",
            task="i2v",
            tokens=32_760,
            schedule=Schedule(dense_steps=0.2, dense_layers=0.03),
            q_clusters=200,
            k_clusters=1000,
            svg1_density=0.3,
            source=_SOURCE.format("i2v_480p"),
            width=5120,
        ),
    ),
)


def causality(transformer: Any) -> str:
    """Object to a SkyReels whose frames read only the frames before them."""
    frames = transformer.config.num_frame_per_block
    if frames == 1:
        return ""
    return f"it is causal, in blocks of {frames} frames, and plans here know no order in time"


def synchronous_grid(transformer: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the token grid; refuse frames that are each at a denoising step of their own."""
    if arguments.get("enable_diffusion_forcing"):
        raise ValueError(
            "diffusion forcing denoises each frame at a step of its own, so no step tells when "
            "attention may be sparse; SkyReelsV2Pipeline and SkyReelsV2ImageToVideoPipeline can be"
        )
    return patch_grid(transformer, arguments)


SKYREELS = replace(
    WAN,
    name="skyreels_v2",
    title="SkyReels V2",
    transformers=("SkyReelsV2Transformer3DModel",),
    original_processors=("SkyReelsV2AttnProcessor",),
    grid=synchronous_grid,
    usual=lambda transformer: {"fps": 24},
    checkpoints=(
        "Skywork/SkyReels-V2-T2V-14B-540P-Diffusers",
        "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers",
        "Skywork/SkyReels-V2-I2V-14B-540P-Diffusers",
        "Skywork/SkyReels-V2-I2V-14B-720P-Diffusers",
    ),
    recipes=(),
    objection=causality,
)
