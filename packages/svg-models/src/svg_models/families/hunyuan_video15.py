"""HunyuanVideo 1.5: the dual-stream blocks of HunyuanVideo, with three kinds of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from svg_models.families.hunyuan_video import HUNYUAN_VIDEO

__all__ = ["HUNYUAN_VIDEO_15"]


def text_lengths(transformer: Any, arguments: Mapping[str, Any]) -> Tensor:
    """Count the valid tokens of both encoders and the image, which the model puts first.

    The image counts whole or, if it is all zeros in every sample, not at all.
    """
    image = arguments["image_embeds"]
    lengths: Tensor = image.any() * image.shape[1]
    for name in ("encoder_attention_mask", "encoder_attention_mask_2"):
        lengths = lengths + arguments[name].bool().sum(dim=1)
    return lengths


def task(transformer: Any) -> str:
    """Return what the checkpoint was trained for, as its configuration says."""
    return str(transformer.config.task_type)


def usual(transformer: Any) -> dict[str, Any]:
    """Return size and frame rate; 640 stands for 480p, 960 for 720p."""
    size = {"height": 720, "width": 1280} if transformer.config.target_size == 960 else {}
    return {"fps": 24} | size


HUNYUAN_VIDEO_15 = replace(
    HUNYUAN_VIDEO,
    name="hunyuan_video15",
    title="HunyuanVideo 1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn",
    original_processors=("HunyuanVideo15AttnProcessor2_0",),
    task=task,
    usual=usual,
    checkpoints=(
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v",
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v",
    ),
    text_lengths=text_lengths,
    recipes=(),
)
