"""The ConsisID pipeline."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import ConsisIDTransformer3DModel
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

from zoo import cogvideox, parts
from zoo.case import Case


def transformer() -> ConsisIDTransformer3DModel:
    torch.manual_seed(3)
    model = ConsisIDTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=1,
        temporal_compression_ratio=4,
        max_text_seq_length=cogvideox.TEXT_TOKENS,
        use_rotary_positional_embeddings=True,
        cross_attn_interval=1,
        is_train_face=True,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=2,
        LFE_vit_dim=2,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=21,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    ).eval()
    tiny.sharpen(model, 2.0)
    return model


def pipeline() -> Any:
    pipe = ConsisIDPipeline(
        tokenizer=tiny.tokenizer(),
        text_encoder=parts.t5(),
        vae=cogvideox.vae(),
        transformer=transformer(),
        scheduler=cogvideox.dpm(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


CASES = (
    Case(
        name="consisid i2v",
        family="consisid",
        task="i2v",
        build=pipeline,
        arguments=cogvideox.ARGUMENTS
        | dict(image=parts.IMAGE, id_vit_hidden=[torch.ones(1, 2, 2)], id_cond=torch.ones(1, 2)),
        grid=(3, 8, 8),
        branches=("call 0",),
        source="timestep",
        text_tokens=cogvideox.TEXT_TOKENS,
    ),
)
