"""Cosmos pipelines: 1.0 with its own autoencoder and scheduler, Predict2 and 2.5 with Wan's."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKLCosmos,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from zoo.case import Case

IMAGE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
CLIP = [IMAGE.rotate(10 * i) for i in range(9)]
ARGUMENTS = dict(
    prompt="a red circle moving left",
    negative_prompt="bad quality",
    num_frames=9,
    height=64,
    width=64,
    guidance_scale=4.0,
    max_sequence_length=12,
)
CALLS = ("call 0", "call 1")


class AcceptsEverything:
    """Stand in for the safety checker, whose package the tests do not need."""

    def to(self, *_: Any) -> AcceptsEverything:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def transformer(channels: int, **changes: Any) -> CosmosTransformer3DModel:
    torch.manual_seed(3)
    settings: dict[str, Any] = dict(
        in_channels=channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=18,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        concat_padding_mask=False,  # diffusers resizes the mask with torchvision
    )
    model = CosmosTransformer3DModel(**(settings | changes)).eval()
    tiny.sharpen(model)
    return model


def pipeline(kind: Any, channels: int) -> Any:
    torch.manual_seed(2)
    vae = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8),
        decode_block_out_channels=(8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        scaling_factor=1.0,
    ).eval()
    scheduler = EDMEulerScheduler(
        sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )
    return assemble(kind, transformer(channels), vae, scheduler)


def assemble(kind: Any, model: Any, vae: Any, scheduler: Any, text: bool = True) -> Any:
    pipe = kind(
        transformer=model,
        vae=vae,
        scheduler=scheduler,
        text_encoder=tiny.text_encoder() if text else None,
        tokenizer=tiny.tokenizer() if text else None,
        safety_checker=AcceptsEverything(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_to_world() -> Any:
    return pipeline(CosmosTextToWorldPipeline, 4)


def video_to_world() -> Any:
    return pipeline(CosmosVideoToWorldPipeline, 5)


def second_video_to_world() -> Any:
    model = transformer(5, extra_pos_embed_type=None)
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return assemble(Cosmos2VideoToWorldPipeline, model, tiny.vae(), scheduler)


def latest() -> Any:
    model = transformer(5, extra_pos_embed_type=None)
    kind = Cosmos2_5_PredictBasePipeline
    return assemble(kind, model, tiny.vae(), UniPCMultistepScheduler(), text=False)


def embeddings(seed: int) -> torch.Tensor:
    return torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(seed))


LATEST = ARGUMENTS | dict(
    prompt=None,
    negative_prompt=None,
    prompt_embeds=embeddings(1),
    negative_prompt_embeds=embeddings(2),
)

CASES = (
    Case(
        name="cosmos 1.0 t2w",
        family="cosmos",
        task="t2v",
        build=text_to_world,
        arguments=ARGUMENTS,
        grid=(3, 8, 8),
        source="scheduler",
        branches=CALLS,
    ),
    Case(
        name="cosmos 1.0 v2w",
        family="cosmos",
        task="i2v",
        build=video_to_world,
        arguments=ARGUMENTS | dict(video=CLIP[:5]),
        grid=(3, 8, 8),
        source="scheduler",
        branches=CALLS,
    ),
    Case(
        name="cosmos predict2 v2w",
        family="cosmos",
        task="i2v",
        build=second_video_to_world,
        arguments=ARGUMENTS | dict(image=IMAGE),
        grid=(3, 8, 8),
        source="scheduler",
        branches=CALLS,
    ),
    Case(
        name="cosmos predict2.5 t2w",
        family="cosmos",
        task="i2v",
        build=latest,
        arguments=LATEST,
        grid=(3, 8, 8),
        source="scheduler",
        branches=CALLS,
    ),
    Case(
        name="cosmos predict2.5 v2w",
        family="cosmos",
        task="i2v",
        build=latest,
        arguments=LATEST | dict(video=CLIP, num_latent_conditional_frames=1),
        grid=(3, 8, 8),
        source="scheduler",
        branches=CALLS,
    ),
)
