"""FramePack: HunyuanVideo that makes a clip section by section, before each its packed history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Any

from torch import Tensor

from svg_models.families import hunyuan_video
from svg_models.families.hunyuan_video import HUNYUAN_VIDEO
from svg_models.families.sharing import STATES, TABLE, Sharing

__all__ = ["FRAMEPACK"]

_PACKED = {"latents_history_2x": 2, "latents_history_4x": 4}


def history(transformer: Any, arguments: Mapping[str, Any]) -> int:
    """Count the tokens of earlier frames: whole ones, and those packed by 2 and 4 on each axis."""
    count = 0
    clean = arguments.get("latents_clean")
    if clean is not None and arguments.get("indices_latents_clean") is not None:
        frames, rows, columns = clean.shape[2:]
        count += frames * (rows // 2) * (columns // 2)
    for name, factor in _PACKED.items():
        packed = arguments.get(name)
        if packed is not None and arguments.get(f"indices_{name}") is not None:
            frames, rows, columns = packed.shape[2:]
            side = 2 * factor
            count += ceil(frames / factor) * ceil(rows / side) * ceil(columns / side)
    return count


def text_lengths(transformer: Any, arguments: Mapping[str, Any]) -> Tensor:
    """Count the tokens of the image, which stand first, and the valid ones of the text."""
    image: int = arguments["image_embeds"].shape[1]
    return hunyuan_video.text_lengths(transformer, arguments) + image


FRAMEPACK = replace(
    HUNYUAN_VIDEO,
    name="framepack",
    title="FramePack",
    transformers=("HunyuanVideoFramepackTransformer3DModel",),
    sharing=Sharing(
        rotation=TABLE,
        inputs={
            r"transformer_blocks\.0": STATES,
            r"transformer_blocks\.\d+": {"freqs_cis": TABLE},
            r"single_transformer_blocks\.\d+": {"image_rotary_emb": TABLE},
        },
        gathered=r"single_transformer_blocks\.\d+",  # then the history is cut off
    ),
    task=lambda transformer: "i2v",
    usual=lambda transformer: {"fps": 30},
    conditions="first",
    condition_tokens=history,
    text_lengths=text_lengths,
    checkpoints=("lllyasviel/FramePackI2V_HY", "lllyasviel/FramePack_F1_I2V_HY_20250503"),
    recipes=(),
)
