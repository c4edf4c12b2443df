"""The videos that `bench_video.py` times: whole pipelines of published shapes, random weights.

Prompts are given as embeddings, so no text encoder is built; weights are drawn on the device, in
the dtype that they are used in. A toy of each family tries the code on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
        arguments: size and guidance of its call, as published.
        unguided: what of these has one forward pass a step, where guidance makes two that compute
            the same; None where a step has one anyway.
        brief: frames of a clip to warm up with.
        steps: denoising steps of a published run.
        grid: token grid of the clip: frames, rows and columns.
        clusters: of queries and keys.
        dense_steps: share of the steps that the published recipe keeps dense.
        dense_layers: share of the layers that it keeps dense.
        pass_s: seconds that a forward pass of diffusers is expected to take on an H100.
        decode_s: seconds that decoding is.
        checkpoints: hub ids of what has these shapes.
        text: parameters of its text encoders, which are not built.
        few: what makes the transformer one of three layers.
    """

    name: str
    build: Callable[[str], Any]
    embeddings: Callable[[str], dict[str, Any]]
    arguments: Mapping[str, Any]
    unguided: Mapping[str, Any] | None = None
    brief: int = 9
    steps: int
    grid: tuple[int, int, int]
    clusters: tuple[int, int]
    dense_steps: float = 0.2
    dense_layers: float = 0.03
    pass_s: float = 0.05
    decode_s: float = 0.1
    checkpoints: tuple[str, ...] = ()
    text: int = 0
    few: Mapping[str, int] = field(default_factory=lambda: {"num_layers": 3})

    @property
    def short(self) -> Video:
        """The same with three layers: a layer needs no memory that another does not give back."""
        build: Any = self.build
        return replace(self, build=replace(build, config={**build.config, **self.few}))

    @property
    def passes(self) -> int:
        """Forward passes of a published step."""
        return 1 if self.unguided is None else 2


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


@dataclass(frozen=True, kw_only=True)
class _Hunyuan15:
    """Build a HunyuanVideo 1.5 pipeline, whose guidance is a component."""

    config: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    images: int = 729

    def __call__(self, device: str) -> Any:
        from diffusers.guiders import ClassifierFreeGuidance

        model = diffusers.HunyuanVideo15Transformer3DModel
        pipe = diffusers.HunyuanVideo15Pipeline(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=random_model(model, {"task_type": "t2v"} | dict(self.config), device),
            vae=random_model(diffusers.AutoencoderKLHunyuanVideo15, self.vae, device),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            guider=ClassifierFreeGuidance(guidance_scale=6.0),
        )
        pipe.vision_num_semantic_tokens = self.images
        pipe.vae.enable_tiling()
        return quiet(pipe)


@dataclass(frozen=True, kw_only=True)
class _CogVideoX:
    """Build a CogVideoX pipeline, which computes both guidance branches in one forward pass."""

    config: Mapping[str, Any]
    vae: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, device: str) -> Any:
        pipe = diffusers.CogVideoXPipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=random_model(diffusers.CogVideoXTransformer3DModel, self.config, device),
            vae=random_model(diffusers.AutoencoderKLCogVideoX, self.vae, device),
            scheduler=diffusers.CogVideoXDDIMScheduler(
                prediction_type="v_prediction", timestep_spacing="trailing"
            ),
        )
        pipe.vae.enable_tiling()
        return quiet(pipe)


class _AcceptsEverything:
    """Stand in for the safety checker, which reads prompts and there are none."""

    def to(self, *_: Any) -> _AcceptsEverything:
        return self

    def check_video_safety(self, video: Any) -> Any:
        return video


@dataclass(frozen=True, kw_only=True)
class _Cosmos:
    """Build a Cosmos 1.0 text-to-world pipeline."""

    config: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, device: str) -> Any:
        return quiet(
            diffusers.CosmosTextToWorldPipeline(
                text_encoder=None,
                tokenizer=None,
                transformer=random_model(diffusers.CosmosTransformer3DModel, self.config, device),
                vae=random_model(diffusers.AutoencoderKLCosmos, self.vae, device),
                scheduler=diffusers.EDMEulerScheduler(
                    sigma_max=80.0,
                    sigma_min=0.002,
                    sigma_data=0.5,
                    sigma_schedule="karras",
                    final_sigmas_type="sigma_min",
                ),
                safety_checker=_AcceptsEverything(),
            )
        )


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


def qwen(tokens: int, widths: tuple[int, int], glyphs: int) -> Callable[[str], dict[str, Any]]:
    """Return what makes the embeddings that HunyuanVideo 1.5 takes; a fifth of them is text."""

    def make(device: str) -> dict[str, Any]:
        draw = torch.Generator(device=device).manual_seed(SEED)
        given: dict[str, Any] = {}
        for place, (count, width) in enumerate(zip((tokens, glyphs), widths, strict=True)):
            end = "_2" if place else ""
            mask = torch.zeros(1, count, device=device, dtype=torch.bfloat16)
            mask[:, : max(1, count // 5)] = 1
            for start in ("", "negative_"):
                rows = torch.randn(1, count, width, generator=draw, device=device)
                given[f"{start}prompt_embeds{end}"] = rows.bfloat16()
                given[f"{start}prompt_embeds_mask{end}"] = mask
        return given

    return make


WAN_1_3B = dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)
HD = dict(height=720, width=1280, num_frames=81)
SD = dict(height=480, width=832, num_frames=81)

# Parameters of text encoders, from their published configurations.
UMT5, T5_XXL, T5_11B = 5_680_910_336, 4_762_310_656, 4_864_791_552
LLAMA, CLIP, QWEN, BYT5 = 7_505_186_816, 123_060_480, 7_070_619_136, 219_314_944
UNGUIDED = dict(guidance_scale=1.0)

VIDEOS = (
    Video(
        name="Wan 2.1 14B, 720p, 81 frames",
        build=_Wan(),
        embeddings=t5(512, 4096, guided=True),
        arguments=HD | dict(guidance_scale=5.0),
        unguided=UNGUIDED,
        steps=50,
        grid=(21, 45, 80),
        clusters=(300, 1000),
        pass_s=12.6,
        decode_s=5.0,
        checkpoints=("Wan-AI/Wan2.1-T2V-14B-Diffusers",),
        text=UMT5,
    ),
    Video(
        name="HunyuanVideo, 720p, 129 frames",
        build=_Hunyuan(),
        embeddings=llama(256, 4096, 768),
        arguments=dict(height=720, width=1280, num_frames=129, guidance_scale=6.0),
        steps=50,
        grid=(33, 45, 80),
        clusters=(400, 1000),
        dense_steps=0.1,
        pass_s=32.0,
        decode_s=30.0,
        checkpoints=("hunyuanvideo-community/HunyuanVideo",),
        text=LLAMA + CLIP,
        few=dict(num_layers=1, num_single_layers=2),
    ),
    Video(
        name="Wan 2.1 1.3B, 480p, 81 frames",
        build=_Wan(config=WAN_1_3B, shift=3.0),
        embeddings=t5(512, 4096, guided=True),
        arguments=SD | dict(guidance_scale=5.0),
        unguided=UNGUIDED,
        steps=50,
        grid=(21, 30, 52),
        clusters=(200, 1000),
        pass_s=0.75,
        decode_s=2.5,
        checkpoints=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
        text=UMT5,
    ),
    Video(
        name="Wan 2.2 A14B, 720p, 81 frames",
        build=_Wan(second=True, shift=12.0),
        embeddings=t5(512, 4096, guided=True),
        arguments=HD | dict(guidance_scale=4.0, guidance_scale_2=3.0),
        unguided=UNGUIDED | dict(guidance_scale_2=1.0),
        steps=40,
        grid=(21, 45, 80),
        clusters=(300, 1000),
        pass_s=12.6,
        decode_s=5.0,
        checkpoints=("Wan-AI/Wan2.2-T2V-A14B-Diffusers",),
        text=UMT5,
    ),
    Video(
        name="HunyuanVideo 1.5, 720p, 121 frames",
        build=_Hunyuan15(),
        embeddings=qwen(1000, (3584, 1472), 256),
        arguments=dict(height=720, width=1280, num_frames=121),
        unguided={"guider": 1.0},
        steps=50,
        grid=(31, 45, 80),
        clusters=(400, 1000),
        dense_steps=0.1,
        pass_s=11.6,
        decode_s=30.0,
        checkpoints=("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",),
        text=QWEN + BYT5,
    ),
    Video(
        name="Cosmos 1.0 14B, 704p, 121 frames",
        build=_Cosmos(config=dict(num_attention_heads=40, num_layers=36)),
        embeddings=t5(512, 1024, guided=True),
        arguments=dict(height=704, width=1280, num_frames=121, guidance_scale=7.0),
        unguided=UNGUIDED,
        brief=17,
        steps=36,
        grid=(16, 44, 80),
        clusters=(400, 1000),
        dense_steps=0.3,
        pass_s=7.2,
        decode_s=10.0,
        checkpoints=("nvidia/Cosmos-1.0-Diffusion-14B-Text2World",),
        text=T5_11B,
    ),
    Video(
        name="CogVideoX 1.5, 768p, 81 frames",
        build=_CogVideoX(
            config=dict(
                num_attention_heads=48,
                num_layers=42,
                sample_width=170,
                sample_height=96,
                sample_frames=81,
                patch_size_t=2,
                patch_bias=False,
                use_rotary_positional_embeddings=True,
            )
        ),
        embeddings=t5(226, 4096, guided=True),
        arguments=dict(height=768, width=1360, num_frames=81, guidance_scale=6.0),
        steps=50,
        grid=(11, 48, 85),
        clusters=(200, 1000),
        dense_layers=0.025,
        pass_s=6.3,
        decode_s=40.0,
        checkpoints=("zai-org/CogVideoX1.5-5B", "THUDM/CogVideoX1.5-5B"),
        text=T5_XXL,
    ),
    Video(
        name="Wan 2.1 14B, 480p, 81 frames",
        build=_Wan(shift=3.0),
        embeddings=t5(512, 4096, guided=True),
        arguments=SD | dict(guidance_scale=5.0),
        unguided=UNGUIDED,
        steps=50,
        grid=(21, 30, 52),
        clusters=(200, 1000),
        pass_s=3.4,
        decode_s=2.5,
        checkpoints=("Wan-AI/Wan2.1-T2V-14B-Diffusers",),
        text=UMT5,
    ),
)

SMALL_WAN = _Wan(
    config=dict(
        num_layers=4,
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
)

TINY = (
    Video(
        name="tiny Wan",
        build=SMALL_WAN,
        embeddings=t5(6, 8, guided=True),
        arguments=dict(height=64, width=64, num_frames=9, guidance_scale=5.0),
        unguided=UNGUIDED,
        brief=5,
        steps=10,
        grid=(3, 8, 8),
        clusters=(4, 12),
    ),
    Video(
        name="tiny Wan, two transformers",
        build=replace(SMALL_WAN, second=True, shift=12.0),
        embeddings=t5(6, 8, guided=True),
        arguments=dict(height=64, width=64, num_frames=9, guidance_scale=4.0, guidance_scale_2=3.0),
        unguided=UNGUIDED | dict(guidance_scale_2=1.0),
        brief=5,
        steps=10,
        grid=(3, 8, 8),
        clusters=(4, 12),
    ),
    Video(
        name="tiny HunyuanVideo",
        build=_Hunyuan(
            config=dict(
                num_layers=1,
                num_single_layers=3,
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
        brief=5,
        steps=10,
        grid=(3, 8, 8),
        clusters=(4, 12),
        few=dict(num_layers=1, num_single_layers=2),
    ),
    Video(
        name="tiny HunyuanVideo 1.5",
        build=_Hunyuan15(
            config=dict(
                in_channels=9,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=4,
                num_refiner_layers=1,
                mlp_ratio=1.0,
                text_embed_dim=16,
                text_embed_2_dim=32,
                image_embed_dim=16,
                rope_axes_dim=(4, 6, 6),
                target_size=32,
            ),
            vae=dict(
                latent_channels=4,
                block_out_channels=(8, 8, 8),
                layers_per_block=1,
                spatial_compression_ratio=4,
                temporal_compression_ratio=4,
                downsample_match_channel=False,
                upsample_match_channel=False,
            ),
            images=4,
        ),
        embeddings=qwen(16, (16, 32), 24),
        arguments=dict(height=32, width=32, num_frames=9),
        unguided={"guider": 1.0},
        brief=5,
        steps=10,
        grid=(3, 8, 8),
        clusters=(4, 12),
    ),
    Video(
        name="tiny Cosmos",
        build=_Cosmos(
            config=dict(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=24,
                num_layers=4,
                mlp_ratio=2,
                text_embed_dim=32,
                adaln_lora_dim=4,
                max_size=(4, 32, 32),
                concat_padding_mask=False,
            ),
            vae=dict(
                latent_channels=4,
                encoder_block_out_channels=(8, 8, 8),
                decode_block_out_channels=(8, 8, 8),
                attention_resolutions=(8,),
                resolution=64,
                num_layers=1,
                spatial_compression_ratio=4,
                temporal_compression_ratio=4,
                scaling_factor=1.0,
            ),
        ),
        embeddings=t5(12, 32, guided=True),
        arguments=dict(height=64, width=64, num_frames=9, guidance_scale=4.0),
        unguided=UNGUIDED,
        brief=5,
        steps=10,
        grid=(3, 8, 8),
        clusters=(4, 12),
    ),
    Video(
        name="tiny CogVideoX 1.5",
        build=_CogVideoX(
            config=dict(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                time_embed_dim=8,
                text_embed_dim=32,
                num_layers=4,
                patch_size=1,
                temporal_compression_ratio=4,
                max_text_seq_length=12,
                use_rotary_positional_embeddings=True,
                patch_size_t=2,
                patch_bias=False,
                sample_width=12,
                sample_height=12,
            ),
            vae=dict(
                down_block_types=("CogVideoXDownBlock3D",) * 3,
                up_block_types=("CogVideoXUpBlock3D",) * 3,
                block_out_channels=(4, 4, 4),
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=2,
                temporal_compression_ratio=4,
            ),
        ),
        embeddings=t5(12, 32, guided=True),
        arguments=dict(height=48, width=48, num_frames=9, guidance_scale=4.0),
        brief=9,
        steps=10,
        grid=(2, 12, 12),
        clusters=(4, 12),
    ),
)
