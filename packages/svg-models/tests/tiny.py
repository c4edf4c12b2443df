"""Wan pipelines of a few thousand parameters, built in memory with nothing from the network.

The processes that tests start import this file too, so it holds no fixtures.
"""

from __future__ import annotations

import re
import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

WORDS = ("a", "the", "red", "green", "blue", "circle", "square", "moving", "left", "bad", "quality")
GRID = (3, 12, 12)
"""Tokens of the default clip: 432 in all, more than three tiles of 128 queries."""


def tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -5.0)]
    pieces += [("\u2581" + word, -2.0) for word in WORDS]
    pieces += [(letter, -10.0) for letter in string.ascii_lowercase]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)


def text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(1)
    config = UMT5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        relative_attention_num_buckets=8,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config).eval()


def vae() -> AutoencoderKLWan:
    torch.manual_seed(2)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
        scale_factor_temporal=4,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def transformer(seed: int = 3, **changes: Any) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=3,
        rope_max_seq_len=32,
    )
    model = WanTransformer3DModel(**(settings | changes)).eval()
    sharpen(model)
    return model


def sharpen(model: nn.Module, factor: float = 3.0) -> None:
    """Make attention peaked, so that leaving keys out changes the result visibly."""
    for name, parameter in model.named_parameters():
        if re.search(r"\.attn1?\.norm_(added_)?[qk]\.weight$", name):
            parameter.data.mul_(factor)


def scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=3.0,
    )


def pipeline(
    model: WanTransformer3DModel | None = None,
    second: WanTransformer3DModel | None = None,
    **options: Any,
) -> WanPipeline:
    pipe = WanPipeline(
        transformer=model if model is not None else transformer(),
        transformer_2=second,
        vae=vae(),
        scheduler=scheduler(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, *, seed: int = 0, **changes: Any) -> Tensor:
    """Run a pipeline with guidance and return its latents; None leaves an argument out."""
    settings: dict[str, Any] = dict(
        prompt="a red circle moving left",
        negative_prompt="bad quality",
        num_frames=4 * (GRID[0] - 1) + 1,
        height=4 * GRID[1],
        width=4 * GRID[2],
        num_inference_steps=4,
        guidance_scale=4.0,
        max_sequence_length=12,
        output_type="latent",
    )
    settings = {key: value for key, value in (settings | changes).items() if value is not None}
    generator = torch.Generator().manual_seed(seed)
    frames: Tensor = pipe(**settings, generator=generator).frames
    return frames


def forward_inputs(batch: int = 1, seed: int = 5) -> dict[str, Any]:
    """Return arguments for one forward pass of `transformer()` over `GRID`."""
    source = torch.Generator().manual_seed(seed)
    return dict(
        hidden_states=torch.randn(batch, 4, *GRID, generator=source),
        timestep=torch.full((batch,), 500),
        encoder_hidden_states=torch.randn(batch, 12, 32, generator=source),
        return_dict=False,
    )
