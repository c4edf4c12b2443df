"""The transformers that `bench_models.py` times: real shapes, and toys to try the code on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A transformer, the clip it denoises, and what is aimed at.

    Attributes:
        name: for people.
        kind: class name in diffusers.
        config: what differs from the defaults of that class.
        latents: channels, frames, rows and columns of the latents.
        small: frames, rows and columns of the latents that outputs are checked on.
        text: tokens and channels of the text.
        pooled: channels of the pooled text embedding, 0 for a model without text in its sequence.
        clusters: of queries and of keys.
        tokens: video tokens of the clip.
        layers: attention layers that are built.
        aim: times faster than diffusers that a sparse step should be.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    latents: tuple[int, int, int, int]
    small: tuple[int, int, int]
    text: tuple[int, int]
    pooled: int = 0
    clusters: tuple[int, int]
    tokens: int
    layers: int
    aim: float


SUBJECTS = (
    Subject(
        name="Wan 2.1 14B, 720p, 81 frames",
        kind="WanTransformer3DModel",
        config=dict(num_layers=4),
        latents=(16, 21, 90, 160),
        small=(3, 32, 32),
        text=(512, 4096),
        clusters=(300, 1000),
        tokens=75_600,
        layers=4,
        aim=2.1,
    ),
    Subject(
        name="HunyuanVideo, 720p, 129 frames",
        kind="HunyuanVideoTransformer3DModel",
        config=dict(num_layers=2, num_single_layers=2),
        latents=(16, 33, 90, 160),
        small=(3, 32, 32),
        text=(256, 4096),
        pooled=768,
        clusters=(400, 1000),
        tokens=118_800,
        layers=4,
        aim=2.8,
    ),
)
TINY = (
    Subject(
        name="tiny Wan",
        kind="WanTransformer3DModel",
        config=dict(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            ffn_dim=32,
        ),
        latents=(4, 3, 16, 16),
        small=(2, 8, 8),
        text=(6, 8),
        clusters=(4, 12),
        tokens=192,
        layers=2,
        aim=1.0,
    ),
    Subject(
        name="tiny HunyuanVideo",
        kind="HunyuanVideoTransformer3DModel",
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
        latents=(4, 3, 16, 16),
        small=(2, 8, 8),
        text=(6, 8),
        pooled=8,
        clusters=(4, 12),
        tokens=192,
        layers=2,
        aim=1.0,
    ),
)
