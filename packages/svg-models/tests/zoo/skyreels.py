"""SkyReels V2 pipelines, with the parts of Wan's."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import (
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
)

from zoo import wan
from zoo.case import Case


def transformer(**changes: Any) -> SkyReelsV2Transformer3DModel:
    torch.manual_seed(3)
    settings: dict[str, Any] = dict(
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
    )
    model = SkyReelsV2Transformer3DModel(**(settings | changes)).eval()
    tiny.sharpen(model)
    return model


def pipeline(kind: Any, model: Any, **parts: Any) -> Any:
    parts = tiny.pipeline().components | dict(transformer=model) | parts
    parts.pop("transformer_2")
    return wan.quiet(kind(**parts))


def text_to_video() -> Any:
    return pipeline(SkyReelsV2Pipeline, transformer())


def image_to_video() -> Any:
    model = transformer(in_channels=12, image_dim=8, added_kv_proj_dim=24)
    return pipeline(SkyReelsV2ImageToVideoPipeline, model, **wan.vision())


CASES = (
    Case(
        name="skyreels v2 t2v",
        family="skyreels_v2",
        task="t2v",
        build=text_to_video,
        arguments=wan.ARGUMENTS,
        grid=(3, 8, 8),
        source="scheduler",
    ),
    Case(
        name="skyreels v2 i2v",
        family="skyreels_v2",
        task="i2v",
        build=image_to_video,
        arguments=wan.ARGUMENTS | dict(image=wan.IMAGE, max_sequence_length=wan.TEXT_TOKENS),
        grid=(3, 8, 8),
        source="scheduler",
    ),
)
