"""The FramePack pipeline, one section long."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import HunyuanVideoFramepackPipeline, HunyuanVideoFramepackTransformer3DModel
from transformers import (
    LlamaConfig,
    LlamaModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from zoo import hunyuan_video, parts
from zoo.case import Case

IMAGE_TOKENS = 25
HISTORY = 360  # two whole frames, two packed by 2 and sixteen by 4


def transformer() -> HunyuanVideoFramepackTransformer3DModel:
    torch.manual_seed(3)
    model = HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=1.0,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=32,
        has_clean_x_embedder=True,
    ).eval()
    tiny.sharpen(model, 6.0)
    return model


def pipeline() -> Any:
    torch.manual_seed(1)
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=30,
        patch_size=6,
    )
    shared = hunyuan_video.shared_parts() | dict(transformer=transformer())
    pipe = HunyuanVideoFramepackPipeline(
        **shared,
        text_encoder=LlamaModel(LlamaConfig(**parts.LLAMA)).eval(),
        image_encoder=SiglipVisionModel(vision).eval(),
        feature_extractor=SiglipImageProcessorPil(size={"height": 30, "width": 30}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


CASES = (
    Case(
        name="framepack i2v",
        family="framepack",
        task="i2v",
        build=pipeline,
        arguments=hunyuan_video.ARGUMENTS
        | dict(
            image=parts.IMAGE,
            height=96,
            width=96,
            latent_window_size=3,
            negative_prompt=None,
            true_cfg_scale=1.0,
        ),
        grid=(3, 12, 12),
        branches=("call 0",),
        source="scheduler",
        text_tokens=HISTORY + IMAGE_TOKENS + 13,
    ),
)
