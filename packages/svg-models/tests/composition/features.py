"""What diffusers and torch can do to a transformer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.models.attention_dispatch import attention_backend

from composition.player import STEPS, Player


@dataclass(frozen=True, kw_only=True)
class Feature:
    """Something that diffusers can do to a transformer.

    Attributes:
        title: for the table.
        apply: does it to a player's transformer.
        steps: how many it takes to show.
        changes: whether a dense model's output must differ with it.
        skips: whether it leaves out calls of the attention.
        around: a context in which all of it runs.
        exact: whether it leaves kernels as they are, so that dense bits must agree.
        tolerance: how far dense results may be off where they need not agree.
    """

    title: str
    apply: Callable[[Player], None]
    steps: int = 2
    changes: bool = False
    skips: bool = False
    around: Callable[[], Any] = nullcontext
    exact: bool = True
    tolerance: float = 1e-5


def lora(player: Player) -> None:
    from peft import LoraConfig

    torch.manual_seed(11)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    player.transformer.add_adapter(config)


def fused(player: Player) -> None:
    name = type(player.transformer).__name__
    try:
        player.transformer.fuse_qkv_projections()
    except RuntimeError as error:
        raise NotImplementedError(f"the original {name} fails with it: {error}") from error
    if not any(getattr(m, "fused_projections", False) for m in player.transformer.modules()):
        raise NotImplementedError(f"fuse_qkv_projections leaves {name} as it is")


def sequential_offload(player: Player) -> None:
    from accelerate import cpu_offload

    cpu_offload(player.transformer, execution_device=torch.device("cpu"))
    if not any(p.device.type == "meta" for p in player.transformer.parameters()):
        raise RuntimeError("nothing was offloaded")


def group_offload(kind: str) -> Callable[[Player], None]:
    def apply(player: Player) -> None:
        player.transformer.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=kind,
            num_blocks_per_group=1,
        )

    return apply


def layerwise_casting(player: Player) -> None:
    player.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def caching(config: Callable[[Player], Any]) -> Callable[[Player], None]:
    def apply(player: Player) -> None:
        player.transformer.enable_cache(config(player))

    return apply


def compiled_whole(player: Player) -> None:
    torch._dynamo.reset()
    player.transformer = torch.compile(player.transformer, backend="aot_eager")


def compiled(player: Player) -> None:
    torch._dynamo.reset()
    player.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")


ATTENTIONS = [r"blocks\.\d+\.attn1", r"(single_)?transformer_blocks\.\d+\.attn1?"]
FEATURES = (
    Feature(title="LoRA (PEFT)", apply=lora, changes=True),
    Feature(title="Fused projections", apply=fused),
    Feature(title="Sequential CPU offload", apply=sequential_offload),
    Feature(title="Group offload by block", apply=group_offload("block_level")),
    Feature(title="Group offload by leaf", apply=group_offload("leaf_level")),
    Feature(title="fp8 layerwise casting", apply=layerwise_casting, changes=True),
    Feature(
        title="bf16 autocast",
        apply=lambda player: None,
        around=lambda: torch.autocast("cpu", torch.bfloat16),
        tolerance=1e-2,
    ),
    Feature(
        title="`set_attention_backend`",
        apply=lambda p: p.transformer.set_attention_backend("_native_math"),
        # diffusers also sets the backend for the whole process; this puts it back.
        around=lambda: attention_backend("native"),
    ),
    Feature(
        title="FirstBlockCache",
        apply=caching(lambda player: FirstBlockCacheConfig(threshold=10.0)),
        steps=STEPS,
        changes=True,
        skips=True,
    ),
    Feature(
        title="MagCache",
        apply=caching(
            lambda player: MagCacheConfig(
                num_inference_steps=STEPS,
                mag_ratios=[1.0] * STEPS,
                threshold=0.9,
                retention_ratio=0.2,
            )
        ),
        steps=STEPS,
        changes=True,
        skips=True,
    ),
    Feature(
        title="Pyramid attention broadcast",
        apply=caching(
            lambda player: PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(100, 850),
                current_timestep_callback=lambda: player.current_timestep,
            )
        ),
        steps=STEPS,
        changes=True,
        skips=True,
    ),
    Feature(
        title="TaylorSeer",
        apply=caching(
            lambda player: TaylorSeerCacheConfig(
                cache_interval=2, disable_cache_before_step=1, cache_identifiers=ATTENTIONS
            )
        ),
        steps=STEPS,
        changes=True,
        skips=True,
        tolerance=1e-3,  # extrapolates, rounding errors included
    ),
)
BLOCKS = Feature(title="`compile_repeated_blocks`", apply=compiled, exact=False)
WHOLE = Feature(title="`torch.compile` of the transformer", apply=compiled_whole, exact=False)
