"""The EasyAnimate pipeline, with prompts that are encoded already."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKLMagvit,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)

from zoo.case import Case

TEXT_TOKENS = 12


def embeds(seed: int) -> torch.Tensor:
    return torch.randn(1, TEXT_TOKENS, 32, generator=torch.Generator().manual_seed(seed))


def transformer() -> EasyAnimateTransformer3DModel:
    torch.manual_seed(3)
    model = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=32,
    ).eval()
    tiny.sharpen(model)
    return model


def pipeline() -> Any:
    torch.manual_seed(2)
    vae = AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    ).eval()
    pipe = EasyAnimatePipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


CASES = (
    Case(
        name="easyanimate t2v",
        family="easyanimate",
        task="t2v",
        build=pipeline,
        arguments=dict(
            prompt_embeds=embeds(1),
            prompt_attention_mask=torch.ones(1, TEXT_TOKENS, dtype=torch.int64),
            negative_prompt_embeds=embeds(2),
            negative_prompt_attention_mask=torch.ones(1, TEXT_TOKENS, dtype=torch.int64),
            num_frames=9,
            height=128,
            width=128,
            guidance_scale=4.0,
        ),
        grid=(3, 8, 8),
        branches=("call 0",),
        source="scheduler",
        text_tokens=TEXT_TOKENS,
    ),
)
