"""HunyuanVideo pipelines: from text, and from an image in the two ways its checkpoints know."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from zoo import parts
from zoo.case import Case

IMAGE_TOKENS = 4


def transformer(**changes: Any) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(3)
    settings: dict[str, Any] = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=1.0,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    model = HunyuanVideoTransformer3DModel(**(settings | changes)).eval()
    tiny.sharpen(model, 6.0)
    return model


def vae() -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(2)
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        mid_block_add_attention=False,
    ).eval()


def shared_parts(**changes: Any) -> dict[str, Any]:
    return dict(
        transformer=transformer(**changes),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        tokenizer=parts.llama_tokenizer(),
        text_encoder_2=parts.clip_text(),
        tokenizer_2=parts.clip_tokenizer(),
    )


def text_encoded(kind: Any, **changes: Any) -> Any:
    torch.manual_seed(1)
    encoder = LlamaModel(LlamaConfig(**parts.LLAMA)).eval()
    pipe = kind(**shared_parts(guidance_embeds=True, **changes), text_encoder=encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_attention_heads=2,
        num_hidden_layers=2,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**parts.LLAMA),
        pad_token_id=3,
        image_token_index=parts.llama_tokenizer().convert_tokens_to_ids("<image>"),
    )
    return LlavaForConditionalGeneration(config).eval()


def image_to_video(condition: str, **changes: Any) -> Any:
    pipe = HunyuanVideoImageToVideoPipeline(
        **shared_parts(image_condition_type=condition, **changes),
        text_encoder=llava(),
        image_processor=CLIPImageProcessorPil(size=16, crop_size=16),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


ARGUMENTS = dict(
    prompt="a red circle",
    negative_prompt="bad",
    true_cfg_scale=3.0,
    num_frames=9,
    height=32,
    width=32,
    max_sequence_length=24,
    prompt_template={"template": "{}", "crop_start": 0},
)
IMAGE_ARGUMENTS = ARGUMENTS | dict(
    image=parts.IMAGE,
    prompt_template={
        "template": "{}",
        "crop_start": 0,
        "image_emb_len": IMAGE_TOKENS,
        "image_emb_start": 5,
        "image_emb_end": 5 + IMAGE_TOKENS,
    },
)

SHARED: dict[str, Any] = dict(
    family="hunyuan_video",
    grid=(3, 8, 8),
    source="scheduler",
    text_tokens=24,
    dense_is_exact=False,
)
CASES = (
    Case(
        name="hunyuan_video t2v",
        task="t2v",
        build=lambda: text_encoded(HunyuanVideoPipeline),
        arguments=ARGUMENTS,
        **SHARED,
    ),
    Case(
        name="hunyuan_video i2v latent_concat",
        task="i2v",
        build=lambda: image_to_video("latent_concat", in_channels=9),
        arguments=IMAGE_ARGUMENTS,
        branches=("call 0", "call 1"),
        **SHARED,
    ),
    Case(
        name="hunyuan_video i2v token_replace",
        task="i2v",
        build=lambda: image_to_video("token_replace", guidance_embeds=True),
        arguments=IMAGE_ARGUMENTS | dict(negative_prompt=None),
        branches=("call 0",),
        **SHARED,
    ),
    Case(
        name="hunyuan_video i2v skyreels",
        task="i2v",
        build=lambda: text_encoded(HunyuanSkyreelsImageToVideoPipeline, in_channels=8),
        arguments=ARGUMENTS | dict(image=parts.IMAGE),
        branches=("call 0", "call 1"),
        **SHARED,
    ),
)
