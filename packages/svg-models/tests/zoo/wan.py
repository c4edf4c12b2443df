"""Wan pipelines."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKLWan,
    WanImageToVideoPipeline,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from zoo.case import Case

ARGUMENTS = dict(
    prompt="a red circle moving left",
    negative_prompt="bad quality",
    num_frames=9,
    height=32,
    width=32,
    guidance_scale=4.0,
    max_sequence_length=12,
)
IMAGE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
CLIP = [IMAGE.rotate(10 * i) for i in range(9)]
TWO = {"transformer": 2, "transformer_2": 2}
# Wan's processors expect this many text tokens behind those of the image.
TEXT_TOKENS = 512


def text_to_video() -> Any:
    return tiny.pipeline(tiny.transformer(num_layers=2))


def two_text_to_video() -> Any:
    first, second = (tiny.transformer(seed, num_layers=2) for seed in (3, 4))
    return tiny.pipeline(first, second, boundary_ratio=0.9)


def vision() -> dict[str, Any]:
    """Return what encodes an image for the cross-attention; this processor needs no torchvision."""
    torch.manual_seed(5)
    config = CLIPVisionConfig(
        hidden_size=8,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=16,
        patch_size=16,
    )
    return dict(
        image_encoder=CLIPVisionModel(config).eval(),
        image_processor=CLIPImageProcessorPil(size=32, crop_size=32),
    )


def image_to_video(*models: Any, **options: Any) -> Any:
    parts = dict(image_encoder=None, image_processor=None) | options
    return quiet(WanImageToVideoPipeline(**(tiny.pipeline(*models).components | parts)))


def first_image_to_video() -> Any:
    settings = dict(in_channels=12, image_dim=8, added_kv_proj_dim=24, num_layers=2)
    return image_to_video(tiny.transformer(**settings), **vision())


def two_image_to_video() -> Any:
    models = (tiny.transformer(seed, in_channels=12, num_layers=2) for seed in (3, 4))
    return image_to_video(*models, boundary_ratio=0.9)


def video_to_video() -> Any:
    parts = text_to_video().components
    parts.pop("transformer_2")
    return quiet(WanVideoToVideoPipeline(**parts))


def patched(kind: Any) -> Any:
    """Make a pipeline like that of TI2V-5B: residual VAE, timesteps per token of 2 x 2 latents."""
    parts = text_to_video().components
    torch.manual_seed(2)
    parts["vae"] = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        in_channels=12,
        out_channels=12,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        is_residual=True,
        patch_size=2,
        scale_factor_spatial=4,
        scale_factor_temporal=2,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    parts["transformer"] = tiny.transformer(num_layers=2, patch_size=(1, 2, 2))
    if kind is WanImageToVideoPipeline:
        parts |= dict(image_encoder=None, image_processor=None)
    return quiet(kind(**parts, expand_timesteps=True))


def patched_text_to_video() -> Any:
    return patched(type(text_to_video()))


def patched_image_to_video() -> Any:
    return patched(WanImageToVideoPipeline)


def vace() -> Any:
    torch.manual_seed(3)
    model = WanVACETransformer3DModel(
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
        vace_layers=[0],
        vace_in_channels=24,
    ).eval()
    tiny.sharpen(model)
    parts = text_to_video().components | dict(transformer=model)
    return quiet(WanVACEPipeline(**parts))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


CASES = (
    Case(
        name="wan t2v",
        family="wan",
        task="t2v",
        build=text_to_video,
        arguments=ARGUMENTS,
        grid=(3, 8, 8),
    ),
    Case(
        name="wan 2.1 i2v",
        family="wan",
        task="i2v",
        build=first_image_to_video,
        arguments=ARGUMENTS | dict(image=IMAGE, max_sequence_length=TEXT_TOKENS),
        grid=(3, 8, 8),
        source="scheduler",
    ),
    Case(
        name="wan v2v",
        family="wan",
        task="t2v",
        build=video_to_video,
        arguments=ARGUMENTS
        | dict(video=CLIP, num_frames=None, num_inference_steps=4, strength=0.5),
        grid=(3, 8, 8),
        source="scheduler",
        branches=("call 0", "call 1"),
    ),
    Case(
        name="wan 2.2 t2v",
        family="wan",
        task="t2v",
        build=two_text_to_video,
        arguments=ARGUMENTS,
        grid=(3, 8, 8),
        layers=TWO,
    ),
    Case(
        name="wan 2.2 i2v",
        family="wan",
        task="i2v",
        build=two_image_to_video,
        arguments=ARGUMENTS | dict(image=IMAGE),
        grid=(3, 8, 8),
        layers=TWO,
        source="scheduler",
    ),
    Case(
        name="wan 2.2 ti2v, text",
        family="wan",
        task="t2v",
        build=patched_text_to_video,
        arguments=ARGUMENTS | dict(num_frames=5, height=64, width=64),
        grid=(3, 8, 8),
    ),
    Case(
        name="wan 2.2 ti2v, image",
        family="wan",
        task="t2v",
        build=patched_image_to_video,
        arguments=ARGUMENTS | dict(num_frames=5, height=64, width=64, image=IMAGE.resize((64, 64))),
        grid=(3, 8, 8),
        source="scheduler",
    ),
    Case(
        name="wan vace",
        family="wan",
        task="t2v",
        build=vace,
        arguments=ARGUMENTS | dict(video=CLIP, reference_images=[IMAGE]),
        grid=(4, 8, 8),
        layers={"transformer": 3},
        source="scheduler",
    ),
)
