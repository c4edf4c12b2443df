"""The Wan Animate pipeline, one segment long."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from diffusers import WanAnimatePipeline, WanAnimateTransformer3DModel
from PIL import Image

from zoo import wan
from zoo.case import Case

FACES = [Image.linear_gradient("L").resize((16, 16)).convert("RGB").rotate(9 * i) for i in range(9)]


def transformer() -> WanAnimateTransformer3DModel:
    torch.manual_seed(3)
    model = WanAnimateTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        image_dim=8,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ).eval()
    tiny.sharpen(model)
    return model


def pipeline() -> Any:
    parts = tiny.pipeline().components
    names = ("tokenizer", "text_encoder", "vae", "scheduler")
    kept = {name: parts[name] for name in names}
    return wan.quiet(WanAnimatePipeline(**kept, transformer=transformer(), **wan.vision()))


CASES = (
    Case(
        name="wan animate",
        family="wan_animate",
        task="i2v",
        build=pipeline,
        arguments=wan.ARGUMENTS
        | dict(
            image=wan.IMAGE,
            pose_video=wan.CLIP,
            face_video=FACES,
            segment_frame_length=9,
            num_frames=None,
            max_sequence_length=wan.TEXT_TOKENS,
        ),
        grid=(4, 8, 8),  # the picture stands before the segment
        source="scheduler",
    ),
)
