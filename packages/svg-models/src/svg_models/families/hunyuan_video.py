"""HunyuanVideo: text after the video, in blocks with a stream for each and in blocks with one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from svg_attention import Schedule
from svg_models.families.base import Family, patch_grid
from svg_models.families.blocks import HUNYUAN_VIDEO_BLOCKS
from svg_models.families.processors import JointProcessor
from svg_models.families.products import Projection
from svg_models.families.published import Published
from svg_models.families.sharing import STATES, TABLE, TABLES, Sharing
from svg_models.families.steps import (
    PER_HEAD,
    HeadRule,
    Stream,
    Values,
    make_heads,
    make_joint_heads,
    project_qkv,
)

__all__ = ["HUNYUAN_VIDEO", "SparseHunyuanVideoProcessor"]


class SparseHunyuanVideoProcessor(JointProcessor):
    """Joint attention of a dual-stream or a single-stream block; the latter projects elsewhere."""

    mask_is_padding = True
    rule: ClassVar[HeadRule] = PER_HEAD

    def prepare(
        self, attn: Any, video: Tensor, text: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Values]:
        """Normalise each head; text has layers of its own in a dual-stream block."""
        norms = (attn.norm_q, attn.norm_k)
        if attn.add_q_proj is None:
            projected, after = project_qkv(attn, video, text), text.shape[1]
            return make_heads(self.rule, attn.heads, norms, projected, rotation, text_after=after)
        stream = Stream(norms=norms, projected=project_qkv(attn, video), rotation=rotation)
        return make_joint_heads(self.rule, attn.heads, stream, text_stream(attn, text))

    def finish(self, attn: Any, states: Tensor, text: int) -> tuple[Tensor, Tensor]:
        """Part text from the end."""
        states = states.flatten(2, 3)
        video, rest = states[:, :-text], states[:, -text:]
        if attn.add_q_proj is None:
            return video, rest
        return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(rest)


def text_stream(attn: Any, states: Tensor) -> Stream:
    """Project the text, `[B, T, C]`, by layers of its own."""
    values = Projection(attn.add_v_proj, states)
    return Stream(
        norms=(attn.norm_added_q, attn.norm_added_k),
        projected=(attn.add_q_proj(states), attn.add_k_proj(states), values),
    )


def text_lengths(transformer: Any, arguments: Mapping[str, Any]) -> Tensor:
    """Count the valid text tokens; the model reads its mask as a length, too."""
    # Pipelines give the mask in bf16, which cannot count past 256.
    lengths: Tensor = arguments["encoder_attention_mask"].sum(dim=1, dtype=torch.int64)
    return lengths


def task(transformer: Any) -> str:
    """Return what the checkpoint was trained for; one for image-to-video says or shows it."""
    config = transformer.config
    replaces = config.image_condition_type is not None
    return "i2v" if replaces or config.in_channels > config.out_channels else "t2v"


_SOURCE = "Sparse-VideoGen 5ce7b01, scripts/hyvideo/hyvideo_t2v_{}_sap.sh and _svg.sh"


def usual(transformer: Any) -> dict[str, Any]:
    """Return the frame rate."""
    return {"fps": 24}


SHARING = Sharing(
    rotation=TABLE,
    inputs={r"transformer_blocks\.0": STATES},
    outputs={"rope": TABLES},
    # Where an image replaces the first frame, its tokens are modulated in another way.
    counts={r"(single_)?transformer_blocks\.\d+": ("num_tokens",)},
)

HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    title="HunyuanVideo",
    transformers=("HunyuanVideoTransformer3DModel",),
    attentions=(r"transformer_blocks\.\d+\.attn", r"single_transformer_blocks\.\d+\.attn"),
    original_processors=("HunyuanVideoAttnProcessor2_0",),
    processor=SparseHunyuanVideoProcessor,
    blocks=HUNYUAN_VIDEO_BLOCKS,
    grid=patch_grid,
    sharing=SHARING,
    task=task,
    usual=usual,
    checkpoints=(
        "hunyuanvideo-community/HunyuanVideo",
        "hunyuanvideo-community/HunyuanVideo-I2V-33ch",
        "hunyuanvideo-community/HunyuanVideo-I2V",
    ),
    text_position="last",
    text_lengths=text_lengths,
    recipes=(
        Published(
            title="HunyuanVideo text-to-video, 720p, 129 frames, 50 steps",
            task="t2v",
            tokens=118_800,
            schedule=Schedule(dense_steps=0.1, dense_layers=0.03),
            q_clusters=400,
            k_clusters=1000,
            svg1_density=0.25,
            source=_SOURCE.format("720p"),
            width=3072,
        ),
        Published(
            title="HunyuanVideo text-to-video, 480 x 720, 129 frames, 50 steps",
            task="t2v",
            tokens=44_550,
            schedule=Schedule(dense_steps=0.04, dense_layers=0.0),
            q_clusters=200,
            k_clusters=1000,
            svg1_density=0.2,
            source=_SOURCE.format("480p"),
            width=3072,
        ),
    ),
)
