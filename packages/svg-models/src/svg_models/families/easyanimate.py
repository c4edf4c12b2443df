"""EasyAnimate 5.1: text before the video, with layers of its own in all but the last blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from svg_models.families.base import Family, patch_grid
from svg_models.families.dense import torch_attention
from svg_models.families.hunyuan_video import text_stream
from svg_models.families.processors import JointProcessor
from svg_models.families.sharing import STATES, TABLE, TABLES, Sharing
from svg_models.families.steps import (
    PER_HEAD,
    Stream,
    Values,
    make_heads,
    make_joint_heads,
    project_out,
    project_qkv,
)

__all__ = ["EASYANIMATE", "SparseEasyAnimateProcessor"]


class SparseEasyAnimateProcessor(JointProcessor):
    """Joint attention of an EasyAnimate block, of two streams or of one."""

    def prepare(
        self, attn: Any, video: Tensor, text: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Values]:
        """Normalise each head; text has layers of its own where there are two streams."""
        norms = (attn.norm_q, attn.norm_k)
        if attn.add_q_proj is None:
            projected, before = project_qkv(attn, text, video), text.shape[1]
            return make_heads(PER_HEAD, attn.heads, norms, projected, rotation, text_before=before)
        stream = Stream(norms=norms, projected=project_qkv(attn, video), rotation=rotation)
        return make_joint_heads(PER_HEAD, attn.heads, text_stream(attn, text), stream)

    def finish(self, attn: Any, states: Tensor, text: int) -> tuple[Tensor, Tensor]:
        """Part text from the beginning and project both."""
        rest = states[:, :text].flatten(2, 3)
        if attn.to_add_out is not None:
            rest = attn.to_add_out(rest)
        return project_out(attn, states[:, text:]), rest


EASYANIMATE = Family(
    name="easyanimate",
    title="EasyAnimate 5.1",
    transformers=("EasyAnimateTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    original_processors=("EasyAnimateAttnProcessor2_0",),
    processor=SparseEasyAnimateProcessor,
    grid=patch_grid,
    sharing=Sharing(
        rotation=TABLE,
        inputs={r"transformer_blocks\.0": STATES},
        outputs={"rope_embedding": TABLES},
    ),
    usual=lambda transformer: {"height": 512, "width": 512, "frames": 49, "fps": 8},
    checkpoints=("alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers",),
    text_position="first",
    dense=torch_attention,
)
