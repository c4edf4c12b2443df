"""The Allegro pipeline."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    EulerAncestralDiscreteScheduler,
)

from zoo import parts
from zoo.case import Case


def transformer() -> AllegroTransformer3DModel:
    torch.manual_seed(3)
    model = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=48,
        sample_width=16,
        sample_height=16,
        sample_frames=3,
        caption_channels=32,
    ).eval()
    for block in model.transformer_blocks:  # peaked; there are no norms to sharpen
        block.attn1.to_q.weight.data.mul_(4.0)
        block.attn1.to_k.weight.data.mul_(4.0)
    return model


def pipeline() -> Any:
    torch.manual_seed(2)
    vae = AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    ).eval()
    pipe = AllegroPipeline(
        tokenizer=tiny.tokenizer(),
        text_encoder=parts.t5(),
        vae=vae,
        transformer=transformer(),
        scheduler=EulerAncestralDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


CASES = (
    Case(
        name="allegro t2v",
        family="allegro",
        task="t2v",
        build=pipeline,
        arguments=dict(
            prompt="a red circle moving left",
            negative_prompt="bad quality",
            num_frames=9,
            height=128,
            width=128,
            guidance_scale=4.0,
            max_sequence_length=12,
            clean_caption=False,
        ),
        grid=(3, 8, 8),
        branches=("call 0",),
        source="scheduler",
    ),
)
