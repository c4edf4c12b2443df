"""CogVideoX 1.0 and 1.5: from text, from an image, from a video."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
)

from zoo import parts
from zoo.case import Case

TEXT_TOKENS = 12
VERSION_15: dict[str, Any] = dict(
    use_rotary_positional_embeddings=True,
    patch_size_t=2,
    patch_bias=False,
    sample_width=12,
    sample_height=12,
)


def transformer(**changes: Any) -> CogVideoXTransformer3DModel:
    torch.manual_seed(3)
    settings: dict[str, Any] = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=1,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT_TOKENS,
    )
    model = CogVideoXTransformer3DModel(**(settings | changes)).eval()
    tiny.sharpen(model, 2.0)
    return model


def vae() -> AutoencoderKLCogVideoX:
    torch.manual_seed(2)
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()


def pipeline(cls: type, scheduler: Any, **changes: Any) -> Any:
    pipe = cls(
        transformer=transformer(**changes),
        vae=vae(),
        scheduler=scheduler,
        text_encoder=parts.t5(),
        tokenizer=tiny.tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dpm() -> CogVideoXDPMScheduler:
    return CogVideoXDPMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")


ARGUMENTS = dict(
    prompt="a red circle moving left",
    negative_prompt="bad quality",
    num_frames=9,
    height=32,
    width=32,
    guidance_scale=4.0,
    max_sequence_length=TEXT_TOKENS,
)
SHARED: dict[str, Any] = dict(
    family="cogvideox",
    source="pipeline timestep",
    branches=("cond_uncond",),
    text_tokens=TEXT_TOKENS,
)
CASES = (
    Case(
        name="cogvideox 1.0 t2v",
        task="t2v",
        build=lambda: pipeline(CogVideoXPipeline, CogVideoXDDIMScheduler()),
        arguments=ARGUMENTS,
        grid=(3, 8, 8),
        **SHARED,
    ),
    Case(
        name="cogvideox 1.5 t2v",
        task="t2v",
        build=lambda: pipeline(CogVideoXPipeline, dpm(), **VERSION_15),
        arguments=ARGUMENTS | dict(height=48, width=48),
        grid=(2, 12, 12),
        **SHARED,
    ),
    Case(
        name="cogvideox 1.0 i2v",
        task="i2v",
        build=lambda: pipeline(
            CogVideoXImageToVideoPipeline,
            CogVideoXDDIMScheduler(),
            in_channels=8,
            use_rotary_positional_embeddings=True,
        ),
        arguments=ARGUMENTS | dict(image=parts.IMAGE),
        grid=(3, 8, 8),
        **SHARED,
    ),
    Case(
        name="cogvideox 1.5 i2v",
        task="i2v",
        build=lambda: pipeline(
            CogVideoXImageToVideoPipeline, dpm(), in_channels=8, ofs_embed_dim=8, **VERSION_15
        ),
        arguments=ARGUMENTS | dict(image=parts.IMAGE, height=48, width=48),
        grid=(2, 12, 12),
        **SHARED,
    ),
    Case(
        name="cogvideox 1.0 v2v",
        task="t2v",
        build=lambda: pipeline(CogVideoXVideoToVideoPipeline, CogVideoXDDIMScheduler()),
        arguments=ARGUMENTS
        | dict(video=parts.video(9, 32), num_frames=None, num_inference_steps=4, strength=0.5),
        grid=(3, 8, 8),
        **SHARED,
    ),
)
