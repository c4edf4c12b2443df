"""HunyuanVideo 1.5: from text and from an image, with a guider that names its passes."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from zoo import parts
from zoo.case import Case

LLM_TOKENS, GLYPH_TOKENS, IMAGE_TOKENS = 16, 24, 4
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def transformer(task_type: str) -> HunyuanVideo15Transformer3DModel:
    torch.manual_seed(3)
    model = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=1.0,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
        target_size=32,
        task_type=task_type,
    ).eval()
    tiny.sharpen(model, 4.0)
    return model


def vae() -> AutoencoderKLHunyuanVideo15:
    torch.manual_seed(2)
    return AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()


def qwen_tokenizer() -> Qwen2Tokenizer:
    pieces = [*parts.bytes_alphabet(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    tokenizer.chat_template = TEMPLATE
    tokenizer.padding_side = "right"
    return tokenizer


def qwen() -> Qwen2_5_VLTextModel:
    torch.manual_seed(1)
    config = Qwen2_5_VLTextConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=256,
        eos_token_id=258,
        rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    )
    return Qwen2_5_VLTextModel(config).eval()


def siglip() -> SiglipVisionModel:
    torch.manual_seed(1)
    config = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return SiglipVisionModel(config).eval()


def pipeline(cls: type, task_type: str, **others: Any) -> Any:
    pipe = cls(
        transformer=transformer(task_type),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=qwen(),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=parts.t5(vocab_size=400),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
        **others,
    )
    # Attributes that the published sizes of prompts and images are written into.
    pipe.system_message, pipe.prompt_template_encode_start_idx = "s", 4
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = LLM_TOKENS, GLYPH_TOKENS
    pipe.vision_num_semantic_tokens = IMAGE_TOKENS
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_to_video() -> Any:
    return pipeline(
        HunyuanVideo15ImageToVideoPipeline,
        "i2v",
        image_encoder=siglip(),
        feature_extractor=SiglipImageProcessorPil(size={"height": 16, "width": 16}),
    )


ARGUMENTS = dict(prompt='a ball, "hi"', negative_prompt="bad", num_frames=9)
SHARED: dict[str, Any] = dict(
    family="hunyuan_video15",
    source="scheduler",
    branches=("pred_cond", "pred_uncond"),
    grid=(3, 8, 8),
    text_tokens=LLM_TOKENS + GLYPH_TOKENS + IMAGE_TOKENS,
    dense_is_exact=False,
)
CASES = (
    Case(
        name="hunyuan_video15 t2v",
        task="t2v",
        build=lambda: pipeline(HunyuanVideo15Pipeline, "t2v"),
        arguments=ARGUMENTS | dict(height=32, width=32),
        **SHARED,
    ),
    Case(
        name="hunyuan_video15 i2v",
        task="i2v",
        build=image_to_video,
        arguments=ARGUMENTS | dict(image=Image.new("RGB", (32, 32), (200, 60, 30))),
        **SHARED,
    ),
)
