"""The Mochi pipeline."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKLMochi,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    MochiTransformer3DModel,
)

from zoo import parts
from zoo.case import Case

TEXT_TOKENS = 12


def transformer() -> MochiTransformer3DModel:
    torch.manual_seed(3)
    model = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=32,
        time_embed_dim=8,
        max_sequence_length=TEXT_TOKENS,
    ).eval()
    model.pos_frequencies.data.normal_(0, 0.5)  # trained; those of a new model turn nothing
    tiny.sharpen(model)
    return model


def vae() -> AutoencoderKLMochi:
    torch.manual_seed(2)
    return AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    ).eval()


def pipeline() -> Any:
    pipe = MochiPipeline(
        transformer=transformer(),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        text_encoder=parts.t5(),
        tokenizer=tiny.tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


CASES = (
    Case(
        name="mochi t2v",
        family="mochi",
        task="t2v",
        build=pipeline,
        arguments=dict(
            prompt="a red circle moving left",
            negative_prompt="bad quality",
            num_frames=13,
            height=128,
            width=128,
            guidance_scale=4.0,
            max_sequence_length=TEXT_TOKENS,
        ),
        grid=(3, 8, 8),
        branches=("cond_uncond",),
        source="scheduler",
        text_tokens=TEXT_TOKENS,
    ),
)
