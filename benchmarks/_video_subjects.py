"""The videos that `bench_video.py` times: whole pipelines of published shapes, random weights.

Prompts are given as embeddings, so no text encoder is built. Toys of two of them try the code on a
CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Video:
    """A pipeline and the clip it makes.

    Attributes:
        name: for people.
        build: returns the pipeline on a device.
        embeddings: returns the arguments that stand for the prompt.
        arguments: size and guidance of its call.
        steps: denoising steps of a published run.
        grid: token grid of the clip: frames, rows and columns.
        clusters: of queries and keys.
        dense_steps: share of the steps that the published recipe keeps dense.
        dense_layers: share of the layers that it keeps dense.
    """

    name: str
    build: Callable[[str], Any]
    embeddings: Callable[[str], dict[str, Any]]
    arguments: Mapping[str, Any]
    steps: int
    grid: tuple[int, int, int]
    clusters: tuple[int, int]
    dense_steps: float = 0.2
    dense_layers: float = 0.03


@dataclass(frozen=True, kw_only=True)
class _Wan:
    """Build a Wan pipeline; `second` adds the transformer of the last steps."""

    config: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    shift: float = 5.0
    second: bool = False

    def __call__(self, device: str) -> Any:
        model = diffusers.WanTransformer3DModel
        options = {"boundary_ratio": 0.875} if self.second else {}
        return quiet(
            diffusers.WanPipeline(
                tokenizer=None,
                text_encoder=None,
                transformer=random_model(model, self.config, device),
                transformer_2=random_model(model, self.config, device) if self.second else None,
                vae=random_model(diffusers.AutoencoderKLWan, self.vae, device),
                scheduler=diffusers.UniPCMultistepScheduler(
                    prediction_type="flow_prediction",
                    use_flow_sigmas=True,
                    num_train_timesteps=1000,
                    flow_shift=self.shift,
                ),
                **options,
            )
        )


@dataclass(frozen=True, kw_only=True)
class _Hunyuan:
    """Build a HunyuanVideo pipeline, whose guidance is distilled into the weights."""

    config: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, device: str) -> Any:
        pipe = diffusers.HunyuanVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=random_model(diffusers.HunyuanVideoTransformer3DModel, self.config, device),
            vae=random_model(diffusers.AutoencoderKLHunyuanVideo, self.vae, device),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        )
        pipe.vae.enable_tiling()  # a decode at once does not fit beside the transformer
        return quiet(pipe)


def random_model(kind: Any, config: Mapping[str, Any], device: str) -> Any:
    """Return a model with random weights in bf16, but for what diffusers keeps in fp32."""
    torch.manual_seed(SEED)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)  # 14 B parameters are not first made in fp32
        try:
            model = kind(**config)
        finally:
            torch.set_default_dtype(before)
    wide = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and wide & set(name.split(".")):
            tensor.data = tensor.data.float()
    return model.eval().requires_grad_(False)


def quiet(pipe: Any) -> Any:
    """Return the pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def t5(tokens: int, width: int, *, guided: bool) -> Callable[[str], dict[str, Any]]:
    """Return what makes embeddings of a prompt, and of a negative one with guidance."""

    def make(device: str) -> dict[str, Any]:
        draw = torch.Generator(device=device).manual_seed(SEED)
        names = ["prompt_embeds", *(["negative_prompt_embeds"] if guided else [])]
        shape = (1, tokens, width)
        return {
            name: 0.1 * torch.randn(shape, generator=draw, device=device).bfloat16()
            for name in names
        }

    return make


def llama(tokens: int, width: int, pooled: int) -> Callable[[str], dict[str, Any]]:
    """Return what makes the embeddings that HunyuanVideo takes."""

    def make(device: str) -> dict[str, Any]:
        draw = torch.Generator(device=device).manual_seed(SEED)
        return {
            "prompt_embeds": torch.randn(
                1, tokens, width, generator=draw, device=device
            ).bfloat16(),
            "prompt_attention_mask": torch.ones(1, tokens, device=device, dtype=torch.bfloat16),
            "pooled_prompt_embeds": torch.randn(
                1, pooled, generator=draw, device=device
            ).bfloat16(),
        }

    return make


WAN_1_3B = dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)
HD = dict(height=720, width=1280, num_frames=81)
SD = dict(height=480, width=832, num_frames=81)

VIDEOS = (
    Video(
        name="Wan 2.1 14B, 720p, 81 frames",
        build=_Wan(),
        embeddings=t5(512, 4096, guided=True),
        arguments=HD | dict(guidance_scale=5.0),
        steps=50,
        grid=(21, 45, 80),
        clusters=(300, 1000),
    ),
    Video(
        name="Wan 2.1 14B, 480p, 81 frames",
        build=_Wan(shift=3.0),
        embeddings=t5(512, 4096, guided=True),
        arguments=SD | dict(guidance_scale=5.0),
        steps=50,
        grid=(21, 30, 52),
        clusters=(200, 1000),
    ),
    Video(
        name="Wan 2.1 1.3B, 480p, 81 frames",
        build=_Wan(config=WAN_1_3B, shift=3.0),
        embeddings=t5(512, 4096, guided=True),
        arguments=SD | dict(guidance_scale=5.0),
        steps=50,
        grid=(21, 30, 52),
        clusters=(200, 1000),
    ),
    Video(
        name="Wan 2.2 A14B, 720p, 81 frames",
        build=_Wan(second=True, shift=12.0),
        embeddings=t5(512, 4096, guided=True),
        arguments=HD | dict(guidance_scale=4.0, guidance_scale_2=3.0),
        steps=40,
        grid=(21, 45, 80),
        clusters=(300, 1000),
    ),
    Video(
        name="HunyuanVideo, 720p, 129 frames",
        build=_Hunyuan(),
        embeddings=llama(256, 4096, 768),
        arguments=dict(height=720, width=1280, num_frames=129, guidance_scale=6.0),
        steps=50,
        grid=(33, 45, 80),
        clusters=(400, 1000),
    ),
)

TINY = (
    Video(
        name="tiny Wan",
        build=_Wan(
            config=dict(
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                text_dim=8,
                ffn_dim=32,
            ),
            vae=dict(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[True, True],
                scale_factor_spatial=4,
                scale_factor_temporal=4,
                latents_mean=[0.0] * 4,
                latents_std=[1.0] * 4,
            ),
        ),
        embeddings=t5(6, 8, guided=True),
        arguments=dict(height=64, width=64, num_frames=9, guidance_scale=5.0),
        steps=10,
        grid=(3, 8, 8),
        clusters=(4, 12),
    ),
    Video(
        name="tiny HunyuanVideo",
        build=_Hunyuan(
            config=dict(
                num_layers=1,
                num_single_layers=1,
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                text_embed_dim=8,
                pooled_projection_dim=8,
                rope_axes_dim=(4, 6, 6),
            ),
            vae=dict(
                latent_channels=4,
                down_block_types=("HunyuanVideoDownBlock3D",) * 4,
                up_block_types=("HunyuanVideoUpBlock3D",) * 4,
                block_out_channels=(4, 4, 4, 4),
                layers_per_block=1,
                norm_num_groups=2,
                mid_block_add_attention=False,
            ),
        ),
        embeddings=llama(6, 8, 8),
        arguments=dict(height=128, width=128, num_frames=9, guidance_scale=6.0),
        steps=10,
        grid=(3, 8, 8),
        clusters=(4, 12),
    ),
)
