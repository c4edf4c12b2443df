"""The ChronoEdit pipeline, which keeps the frames in between for some of its steps."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import (
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
)

from zoo import wan
from zoo.case import Case


def transformer() -> ChronoEditTransformer3DModel:
    torch.manual_seed(3)
    model = ChronoEditTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=12,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        image_dim=8,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
    ).eval()
    tiny.sharpen(model)
    return model


def pipeline() -> Any:
    parts = tiny.pipeline().components
    return wan.quiet(
        ChronoEditPipeline(
            tokenizer=parts["tokenizer"],
            text_encoder=parts["text_encoder"],
            vae=parts["vae"],
            transformer=transformer(),
            scheduler=parts["scheduler"],  # whose memory it shortens together with the latents
            **wan.vision(),
        )
    )


CASES = (
    Case(
        name="chronoedit i2v",
        family="chronoedit",
        task="i2v",
        build=pipeline,
        arguments=wan.ARGUMENTS
        | dict(
            image=wan.IMAGE,
            max_sequence_length=wan.TEXT_TOKENS,
            enable_temporal_reasoning=True,
            num_temporal_reasoning_steps=2,
        ),
        grid=(3, 8, 8),
        branches=("call 0", "call 1"),
        source="scheduler",
    ),
)
