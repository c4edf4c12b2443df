"""The bidirectional AnyFlow pipeline."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

from zoo import wan
from zoo.case import Case


def transformer() -> AnyFlowTransformer3DModel:
    torch.manual_seed(3)
    model = AnyFlowTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()
    tiny.sharpen(model)
    return model


def pipeline() -> Any:
    parts = tiny.pipeline().components
    return wan.quiet(
        AnyFlowPipeline(
            tokenizer=parts["tokenizer"],
            text_encoder=parts["text_encoder"],
            vae=parts["vae"],
            transformer=transformer(),
            scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
        )
    )


CASES = (
    Case(
        name="anyflow t2v",
        family="anyflow",
        task="t2v",
        build=pipeline,
        arguments=wan.ARGUMENTS | dict(max_sequence_length=wan.TEXT_TOKENS),
        grid=(3, 8, 8),
        branches=("call 0",),
        source="scheduler",
    ),
)
