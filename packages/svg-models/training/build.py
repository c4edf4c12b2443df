"""Make the untrained parts of the embedded pipeline in diffusers' and transformers' classes."""

from __future__ import annotations

import string
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .clips import vocabulary

FLOW_SHIFT = 3.0
VAE_FACTORS = (4, 8)  # frames and pixels per latent


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the trained networks; the defaults are those of the packaged model."""

    heads: int = 4
    head_dim: int = 64
    layers: int = 6
    ffn_dim: int = 640
    text_dim: int = 128
    text_layers: int = 2
    latent_channels: int = 16
    encoder_dim: int = 16
    decoder_dim: int = 24
    dim_mult: tuple[int, ...] = (1, 2, 2)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def make_tokenizer() -> Any:
    """Make a word-level T5 tokenizer: the grammar's words, then letters for everything else."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -2.0) for word in vocabulary() if word != ","]
    pieces += [(",", -2.0), ("▁", -5.0)]
    letters = string.ascii_lowercase + string.digits + string.punctuation.replace(",", "")
    pieces += [(letter, -10.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def make_text_encoder(shape: Shape, vocab_size: int) -> Any:
    """Make an untrained UMT5 encoder."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=shape.text_dim,
        d_kv=shape.text_dim // 4,
        d_ff=2 * shape.text_dim,
        num_layers=shape.text_layers,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config)


def make_vae(shape: Shape) -> Any:
    """Make an untrained autoencoder: 4 frames x 8 x 8 pixels to one latent of 16 channels."""
    from diffusers import AutoencoderKLWan

    zeros, ones = [0.0] * shape.latent_channels, [1.0] * shape.latent_channels
    return AutoencoderKLWan(
        base_dim=shape.encoder_dim,
        decoder_base_dim=shape.decoder_dim,
        z_dim=shape.latent_channels,
        dim_mult=list(shape.dim_mult),
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=VAE_FACTORS[0],
        scale_factor_spatial=VAE_FACTORS[1],
        latents_mean=zeros,
        latents_std=ones,
    )


def make_transformer(shape: Shape) -> Any:
    """Make an untrained Wan transformer with one token per latent."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_dim,
        in_channels=shape.latent_channels,
        out_channels=shape.latent_channels,
        text_dim=shape.text_dim,
        freq_dim=64,
        ffn_dim=shape.ffn_dim,
        num_layers=shape.layers,
        rope_max_seq_len=128,
    )


def assemble(transformer: Any, vae: Any, text_encoder: nn.Module, tokenizer: Any) -> Any:
    """Put the parts into a `WanPipeline` with the scheduler they are trained for."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=FLOW_SHIFT,
    )
    return WanPipeline(
        transformer=transformer,
        transformer_2=None,
        vae=vae,
        scheduler=scheduler,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def save_pipeline(pipe: Any, folder: Path) -> int:
    """Save a pipeline in bf16 and return its size in bytes."""
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        for value in [*part.parameters(), *part.buffers()]:
            if value.is_floating_point():
                value.data = value.data.to(torch.bfloat16)
    pipe.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def encode_text(text_encoder: nn.Module, ids: Tensor, mask: Tensor, *, length: int) -> Tensor:
    """Embed prompts as `WanPipeline` does: zeros after a prompt's own tokens, up to `length`.

    Args:
        text_encoder: UMT5 encoder.
        ids: int64 `[B, L]`.
        mask: int64 `[B, L]`, 1 for a prompt's own tokens.
        length: tokens to return, at least `L`.
    """
    hidden = text_encoder(ids, mask).last_hidden_state * mask[..., None]
    return nn.functional.pad(hidden, (0, 0, 0, length - hidden.shape[1]))
