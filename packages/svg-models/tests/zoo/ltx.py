"""LTX-Video pipelines."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image

from zoo.case import Case

IMAGE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
ARGUMENTS = dict(
    prompt="a red circle moving left",
    negative_prompt="bad quality",
    num_frames=9,
    height=64,
    width=64,
    guidance_scale=4.0,
    max_sequence_length=12,
)


def transformer() -> LTXVideoTransformer3DModel:
    torch.manual_seed(3)
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    ).eval()
    tiny.sharpen(model)
    return model


def vae() -> AutoencoderKLLTXVideo:
    torch.manual_seed(2)
    model = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=2,
        decoder_causal=False,
    ).eval()
    model.use_framewise_encoding = model.use_framewise_decoding = False
    return model


def pipeline(kind: Any) -> Any:
    pipe = kind(
        transformer=transformer(),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=tiny.text_encoder(),
        tokenizer=tiny.tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_to_video() -> Any:
    return pipeline(LTXPipeline)


def image_to_video() -> Any:
    return pipeline(LTXImageToVideoPipeline)


def with_conditions() -> Any:
    return pipeline(LTXConditionPipeline)


def conditions(*frames: int) -> dict[str, Any]:
    """Return the arguments of a call with an image at each of these video frames."""
    return ARGUMENTS | dict(
        conditions=[LTXVideoCondition(image=IMAGE, frame_index=frame) for frame in frames]
    )


CASES = (
    Case(
        name="ltx t2v",
        family="ltx",
        task="t2v",
        build=text_to_video,
        arguments=ARGUMENTS,
        grid=(3, 8, 8),
        branches=("cond_uncond",),
        source="scheduler",
    ),
    Case(
        name="ltx i2v",
        family="ltx",
        task="t2v",
        build=image_to_video,
        arguments=ARGUMENTS | dict(image=IMAGE),
        grid=(3, 8, 8),
        branches=("cond_uncond",),
        source="scheduler",
    ),
    Case(
        name="ltx condition t2v",
        family="ltx",
        task="t2v",
        build=with_conditions,
        arguments=ARGUMENTS,
        grid=(3, 8, 8),
        branches=("cond_uncond",),
        source="scheduler",
    ),
    Case(
        name="ltx first image",
        family="ltx",
        task="t2v",
        build=with_conditions,
        arguments=conditions(0),
        grid=(3, 8, 8),
        branches=("cond_uncond",),
        source="scheduler",
    ),
    Case(
        name="ltx later images",
        family="ltx",
        task="t2v",
        build=with_conditions,
        arguments=conditions(0, 4, 8),
        grid=(3, 8, 8),
        text_tokens=2 * 64,  # what stands before the clip, an image a frame
        branches=("cond_uncond",),
        source="scheduler",
    ),
)
