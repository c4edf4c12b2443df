"""Mochi 1: the dual-stream attention of HunyuanVideo, each head rotated its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svg_models.families.base import Family, patch_grid
from svg_models.families.dense import torch_attention
from svg_models.families.hunyuan_video import SparseHunyuanVideoProcessor, text_lengths
from svg_models.families.sharing import STATES, Sharing
from svg_models.families.steps import HeadRule, project_out

__all__ = ["MOCHI", "SparseMochiProcessor"]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels of `[B, S, H, D]`; tables are `[S, H, D / 2]`, fp32."""
    even, odd = states[..., 0::2].float(), states[..., 1::2].float()
    turned = (even * cos - odd * sin, even * sin + odd * cos)
    return torch.stack([x.to(states.dtype) for x in turned], dim=-1).flatten(-2)


class SparseMochiProcessor(SparseHunyuanVideoProcessor):
    """Joint attention of a Mochi block; the last one makes no text."""

    rule = HeadRule(rotate=rotate)

    def finish(self, attn: Any, states: Tensor, text: int) -> tuple[Tensor, Tensor]:
        """Part text from the end and project both."""
        rest = states[:, -text:].flatten(2, 3)
        if not attn.context_pre_only:
            rest = attn.to_add_out(rest)
        return project_out(attn, states[:, :-text]), rest


MOCHI = Family(
    name="mochi",
    title="Mochi 1",
    transformers=("MochiTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    original_processors=("MochiAttnProcessor2_0",),
    processor=SparseMochiProcessor,
    grid=patch_grid,
    sharing=Sharing(
        rotation={3: 0},
        inputs={r"transformer_blocks\.0": STATES},
        outputs={"rope": {0: {3: 0}, 1: {3: 0}}},
    ),
    usual=lambda transformer: {"frames": 85, "fps": 30},
    checkpoints=("genmo/mochi-1-preview",),
    text_position="last",
    text_lengths=text_lengths,
    dense=torch_attention,
)
