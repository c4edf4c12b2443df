"""LTX-2 pipelines, with prompts that are encoded already, and without the decoder of sound."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from PIL import Image

from zoo.case import Case

IMAGE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
TEXT = 12


def embeds(seed: int) -> torch.Tensor:
    return torch.randn(1, TEXT, 16 * 2, generator=torch.Generator().manual_seed(seed))


ARGUMENTS: dict[str, Any] = dict(
    prompt_embeds=embeds(1),
    prompt_attention_mask=torch.ones(1, TEXT, dtype=torch.int64),
    negative_prompt_embeds=embeds(2),
    negative_prompt_attention_mask=torch.ones(1, TEXT, dtype=torch.int64),
    num_frames=9,
    height=64,
    width=64,
    guidance_scale=4.0,
    stg_scale=0.0,
    audio_stg_scale=0.0,
)


def transformer(**changes: Any) -> LTX2VideoTransformer3DModel:
    torch.manual_seed(3)
    settings: dict[str, Any] = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        vae_scale_factors=(4, 8, 8),
        norm_elementwise_affine=True,
        num_layers=2,
        caption_channels=16,
    )
    model = LTX2VideoTransformer3DModel(**(settings | changes)).eval()
    for block in model.transformer_blocks:  # peaked, so that leaving keys out shows
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.weight.data.mul_(3.0)
        if block.attn1.to_gate_logits is not None:
            block.attn1.to_gate_logits.weight.data.normal_()
    return model


def vae() -> AutoencoderKLLTX2Video:
    torch.manual_seed(2)
    model = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False),
        downsample_type=("spatiotemporal",) * 4,
        patch_size=2,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    ).eval()
    model.use_framewise_encoding = model.use_framewise_decoding = False
    return model


def audio_vae() -> AutoencoderKLLTX2Audio:
    torch.manual_seed(2)
    return AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=16
    ).eval()


def connectors() -> LTX2TextConnectors:
    torch.manual_seed(4)
    settings = {
        f"{kind}_connector_{name}": value
        for kind in ("video", "audio")
        for name, value in dict(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_learnable_registers=None,
        ).items()
    }
    return LTX2TextConnectors(caption_channels=16, text_proj_in_factor=2, **settings).eval()


def pipeline(kind: Any, **changes: Any) -> Any:
    pipe = kind(
        transformer=transformer(**changes),
        vae=vae(),
        audio_vae=audio_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
        connectors=connectors(),
        vocoder=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


LATER: dict[str, Any] = dict(
    rope_type="split", gated_attn=True, audio_gated_attn=True, perturbed_attn=True
)
SHARED: dict[str, Any] = dict(
    family="ltx2",
    task="t2v",
    grid=(3, 8, 8),
    branches=("cond_uncond", "uncond_modality"),
    source="scheduler",
)
CASES = (
    Case(
        name="ltx2 t2v",
        build=lambda: pipeline(LTX2Pipeline),
        arguments=ARGUMENTS,
        **SHARED,
    ),
    Case(
        name="ltx2 gated t2v",
        build=lambda: pipeline(LTX2Pipeline, **LATER),
        arguments=ARGUMENTS,
        **SHARED,
    ),
    Case(
        name="ltx2 i2v",
        build=lambda: pipeline(LTX2ImageToVideoPipeline, **LATER),
        arguments=ARGUMENTS | dict(image=IMAGE),
        **SHARED,
    ),
    Case(
        name="ltx2 later image",
        build=lambda: pipeline(LTX2ConditionPipeline),
        arguments=ARGUMENTS | dict(conditions=[LTX2VideoCondition(frames=IMAGE, index=2)]),
        text_tokens=64,  # what stands behind the clip
        **SHARED,
    ),
)
