"""Hidden states that a norm has written in fp8, for layers whose products are in fp8.

Such layers round each row of what they take to e4m3 by a scale of its own. Where they are all that
reads what a norm returns, the norm writes these rows itself, and the tensor that would be written,
read and rounded is never there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor

from svg_models.families import fused
from svg_models.families.instance_forward import InstanceForward, has_known_forward
from svg_models.families.processors import VideoProcessor, original_of

__all__ = ["Fp8Rows", "reads_fp8_rows"]

# Processors of diffusers that give their hidden states to the layers of an attention alone.
PROJECTING = ("WanAttnProcessor", "SkyReelsV2AttnProcessor", "CosmosAttnProcessor2_0")


@dataclass(frozen=True, eq=False)
class Fp8Rows:
    """What stands for a tensor `[..., C]`; whatever would read that raises.

    Attributes:
        values: e4m3 `[..., C]`.
        scales: fp32 `[..., 1]`, a factor of each row of the values.
        dtype: of the tensor, and of a product with it.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


def reads_fp8_rows(module: Any, states: Tensor) -> bool:
    """Return whether `Fp8Rows` may take the place of a module's hidden states.

    Args:
        module: an attention or a feed-forward of a block.
        states: a tensor of as many rows, in the dtype of the block.
    """
    if fused.is_hooked(module) or torch.compiler.is_compiling():
        return False
    if type(module) is FeedForward:
        first = module.net[0]
        return (
            has_known_forward(module)
            and type(first) is GELU
            and fused.is_untouched(first)
            and _takes(first.proj, states)
        )
    if not fused.is_untouched(module):
        return False
    processor = getattr(module, "processor", None)
    original = original_of(processor)
    ours = processor is original or isinstance(processor, VideoProcessor)
    if not ours or type(original).__name__ not in PROJECTING:
        return False
    layers = [module.to_q]
    if not module.is_cross_attention:
        joined = getattr(module, "fused_projections", False)
        layers = [module.to_qkv] if joined else [module.to_q, module.to_k, module.to_v]
    return all(_takes(layer, states) for layer in layers)


def _takes(layer: Any, states: Tensor) -> bool:
    """Return whether the product of a layer with `states` is in fp8 at this moment."""
    forward = InstanceForward.at(layer)
    return forward is not None and forward.takes_fp8_rows(states) and not fused.is_hooked(layer)
