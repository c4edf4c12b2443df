"""Published checkpoints: what their configuration says, and the self-attentions it leads to.

Settings that a transformer class has by default are left out. Sources are scripts of diffusers that
convert the original weights, and class defaults of diffusers 0.42.1 where a script names none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CHECKPOINTS", "Checkpoint"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One configuration, which several checkpoints may share.

    Attributes:
        names: on the hub.
        family: name of the family.
        task: see `Family.task`.
        transformer: its class in diffusers.
        layers: video self-attentions.
        heads: of each.
        head_dim: channels of a head.
        source: where the numbers are from.
        config: what differs from the defaults of the class.
    """

    names: tuple[str, ...]
    family: str
    task: str
    transformer: str
    layers: int
    heads: int
    head_dim: int
    source: str
    config: Mapping[str, Any] = field(default_factory=dict)


def wan(*names: str, **changes: Any) -> Checkpoint:
    settings: dict[str, Any] = dict(
        family="wan",
        task="t2v",
        transformer="WanTransformer3DModel",
        layers=40,
        heads=40,
        head_dim=128,
        source="convert_wan_to_diffusers.py",
    )
    return Checkpoint(names=tuple(f"Wan-AI/{name}" for name in names), **(settings | changes))


def hunyuan(*names: str, **changes: Any) -> Checkpoint:
    settings: dict[str, Any] = dict(
        family="hunyuan_video",
        task="i2v",
        transformer="HunyuanVideoTransformer3DModel",
        layers=20 + 40,
        heads=24,
        head_dim=128,
        source="convert_hunyuan_video_to_diffusers.py",
    )
    names = tuple(f"hunyuanvideo-community/{name}" for name in names)
    return Checkpoint(names=names, **(settings | changes))


def cosmos(*names: str, large: bool, **changes: Any) -> Checkpoint:
    settings: dict[str, Any] = dict(
        family="cosmos",
        task="i2v",
        transformer="CosmosTransformer3DModel",
        layers=36 if large else 28,
        heads=40 if large else 16,
        head_dim=128,
        source="convert_cosmos_to_diffusers.py",
    )
    settings |= changes
    config = dict(num_layers=settings["layers"], num_attention_heads=settings["heads"])
    settings["config"] = config | dict(settings.get("config", {}))
    return Checkpoint(names=tuple(f"nvidia/Cosmos-{name}" for name in names), **settings)


def cogvideox(*names: str, **changes: Any) -> Checkpoint:
    settings: dict[str, Any] = dict(
        family="cogvideox",
        task="t2v",
        transformer="CogVideoXTransformer3DModel",
        layers=42,
        heads=48,
        head_dim=64,
        source="convert_cogvideox_to_diffusers.py",
    )
    settings |= changes
    config = dict(num_layers=settings["layers"], num_attention_heads=settings["heads"])
    settings["config"] = config | dict(settings.get("config", {}))
    return Checkpoint(names=tuple(f"zai-org/{name}" for name in names), **settings)


SMALL_WAN = dict(ffn_dim=8960, num_attention_heads=12, num_layers=30)
FIRST_IMAGE = dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
LAST_COSMOS = dict(
    in_channels=17,
    extra_pos_embed_type=None,
    use_crossattn_projection=True,
    crossattn_proj_in_channels=100_352,
)
LATER_COG = dict(
    patch_size_t=2,
    patch_bias=False,
    sample_frames=81,
    sample_height=300,
    sample_width=300,
    use_rotary_positional_embeddings=True,
)

CHECKPOINTS: tuple[Checkpoint, ...] = (
    wan("Wan2.1-T2V-1.3B-Diffusers", layers=30, heads=12, config=SMALL_WAN),
    wan("Wan2.1-T2V-14B-Diffusers", "Wan2.2-T2V-A14B-Diffusers"),
    wan(
        "Wan2.1-I2V-14B-480P-Diffusers",
        "Wan2.1-I2V-14B-720P-Diffusers",
        task="i2v",
        config=FIRST_IMAGE,
    ),
    wan("Wan2.2-I2V-A14B-Diffusers", task="i2v", config=dict(in_channels=36)),
    wan(
        "Wan2.2-TI2V-5B-Diffusers",
        layers=30,
        heads=24,
        config=dict(
            ffn_dim=14_336, in_channels=48, out_channels=48, num_attention_heads=24, num_layers=30
        ),
    ),
    wan(
        "Wan2.1-VACE-1.3B-diffusers",
        transformer="WanVACETransformer3DModel",
        layers=15 + 30,
        heads=12,
        config=SMALL_WAN | dict(vace_layers=list(range(0, 30, 2))),
    ),
    wan("Wan2.1-VACE-14B-diffusers", transformer="WanVACETransformer3DModel", layers=8 + 40),
    *(
        Checkpoint(
            names=tuple(
                f"Skywork/SkyReels-V2-{task.upper()}-14B-{size}-Diffusers"
                for size in ("540P", "720P")
            ),
            family="skyreels_v2",
            task=task,
            transformer="SkyReelsV2Transformer3DModel",
            layers=40,
            heads=40,
            head_dim=128,
            source="convert_skyreelsv2_to_diffusers.py",
            config=dict(num_attention_heads=40, num_layers=40, ffn_dim=13_824) | more,
        )
        for task, more in (("t2v", {}), ("i2v", FIRST_IMAGE))
    ),
    hunyuan("HunyuanVideo", task="t2v"),
    hunyuan(
        "HunyuanVideo-I2V-33ch",
        config=dict(in_channels=33, guidance_embeds=False, image_condition_type="latent_concat"),
    ),
    hunyuan("HunyuanVideo-I2V", config=dict(image_condition_type="token_replace")),
    *(
        hunyuan(
            *(f"HunyuanVideo-1.5-Diffusers-{size}_{task}" for size in ("480p", "720p")),
            family="hunyuan_video15",
            task=task,
            transformer="HunyuanVideo15Transformer3DModel",
            layers=54,
            heads=16,
            source="convert_hunyuan_video1_5_to_diffusers.py",
            config=dict(task_type=task),
        )
        for task in ("t2v", "i2v")
    ),
    cosmos("1.0-Diffusion-7B-Text2World", large=False, heads=32, task="t2v"),
    cosmos("1.0-Diffusion-7B-Video2World", large=False, heads=32, config=dict(in_channels=17)),
    cosmos("1.0-Diffusion-14B-Text2World", large=True, task="t2v"),
    cosmos("1.0-Diffusion-14B-Video2World", large=True, config=dict(in_channels=17)),
    *(
        cosmos(
            f"Predict2-{size}-Video2World",
            large=size == "14B",
            config=dict(in_channels=17, extra_pos_embed_type=None),
        )
        for size in ("2B", "14B")
    ),
    *(
        cosmos(f"Predict2.5-{size}", large=size == "14B", config=LAST_COSMOS)
        for size in ("2B", "14B")
    ),
    cogvideox("CogVideoX-2b", layers=30, heads=30),
    cogvideox("CogVideoX-5b", config=dict(use_rotary_positional_embeddings=True)),
    cogvideox(
        "CogVideoX-5b-I2V",
        task="i2v",
        config=dict(
            in_channels=32,
            use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=True,
        ),
    ),
    cogvideox("CogVideoX1.5-5B", config=LATER_COG),
    cogvideox(
        "CogVideoX1.5-5B-I2V",
        task="i2v",
        config=LATER_COG | dict(in_channels=32, ofs_embed_dim=512),
    ),
    Checkpoint(
        names=("Lightricks/LTX-Video",),
        family="ltx",
        task="t2v",
        transformer="LTXVideoTransformer3DModel",
        layers=28,
        heads=32,
        head_dim=64,
        source="convert_ltx_to_diffusers.py",
    ),
    Checkpoint(
        names=("Lightricks/LTX-Video-0.9.7-dev",),
        family="ltx",
        task="t2v",
        transformer="LTXVideoTransformer3DModel",
        layers=48,
        heads=32,
        head_dim=128,
        source="convert_ltx_to_diffusers.py",
        config=dict(num_layers=48, attention_head_dim=128, cross_attention_dim=4096),
    ),
    Checkpoint(
        names=("genmo/mochi-1-preview",),
        family="mochi",
        task="t2v",
        transformer="MochiTransformer3DModel",
        layers=48,
        heads=24,
        head_dim=128,
        source="convert_mochi_to_diffusers.py",
    ),
    Checkpoint(
        names=("Lightricks/LTX-2",),
        family="ltx2",
        task="t2v",
        transformer="LTX2VideoTransformer3DModel",
        layers=48,
        heads=32,
        head_dim=128,
        source="class defaults; convert_ltx2_to_diffusers.py",
    ),
    wan(
        "Wan2.2-Animate-14B-Diffusers",
        family="wan_animate",
        task="i2v",
        transformer="WanAnimateTransformer3DModel",
        source="class defaults",
        config=dict(added_kv_proj_dim=5120),
    ),
    Checkpoint(
        names=("nvidia/ChronoEdit-14B-Diffusers",),
        family="chronoedit",
        task="i2v",
        transformer="ChronoEditTransformer3DModel",
        layers=40,
        heads=40,
        head_dim=128,
        source="that of Wan 2.1 14B image-to-video, which it was trained from",
        config=FIRST_IMAGE,
    ),
    Checkpoint(
        names=("nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers",),
        family="anyflow",
        task="t2v",
        transformer="AnyFlowTransformer3DModel",
        layers=40,
        heads=40,
        head_dim=128,
        source="class defaults",
    ),
    Checkpoint(
        names=("rhymes-ai/Allegro",),
        family="allegro",
        task="t2v",
        transformer="AllegroTransformer3DModel",
        layers=32,
        heads=24,
        head_dim=96,
        source="class defaults; convert_allegro_to_diffusers.py",
    ),
    Checkpoint(
        names=("BestWishYsh/ConsisID-preview",),
        family="consisid",
        task="i2v",
        transformer="ConsisIDTransformer3DModel",
        layers=42,
        heads=48,
        head_dim=64,
        source="that of CogVideoX 5B, which it was trained from",
        config=dict(
            num_layers=42,
            num_attention_heads=48,
            in_channels=32,
            use_rotary_positional_embeddings=True,
        ),
    ),
    Checkpoint(
        names=("alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers",),
        family="easyanimate",
        task="t2v",
        transformer="EasyAnimateTransformer3DModel",
        layers=48,
        heads=48,
        head_dim=64,
        source="class defaults",
        config=dict(in_channels=16, out_channels=16, patch_size=2),
    ),
    Checkpoint(
        names=("lllyasviel/FramePackI2V_HY", "lllyasviel/FramePack_F1_I2V_HY_20250503"),
        family="framepack",
        task="i2v",
        transformer="HunyuanVideoFramepackTransformer3DModel",
        layers=20 + 40,
        heads=24,
        head_dim=128,
        source="class defaults",
        config=dict(has_image_proj=True, has_clean_x_embedder=True),
    ),
)
