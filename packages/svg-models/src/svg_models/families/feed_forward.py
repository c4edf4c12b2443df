"""Feed-forwards whose GELU is the epilogue of the matrix product before it.

The product then writes what the GELU returns, and the widest tensor of a block, which would be
written, read and written again, is written once. It is rounded once, too.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from svg_models.families import fused
from svg_models.families.fp8_rows import Fp8Rows
from svg_models.families.products import does_as_its_class, gelu_product, is_product

__all__ = ["feed_forward"]


def feed_forward(module: Any, states: Tensor | Fp8Rows) -> Tensor:
    """Compute a feed-forward, in two products where that is what its class comes to.

    Args:
        module: the layer of a block; anything but diffusers' `FeedForward` of a GELU by tanh and
            plain linear layers is called.
        states: `[..., C]`.
    """
    if isinstance(states, Fp8Rows) or not _joins(module, states):
        out: Tensor = module(states)
        return out
    activation, _, last = module.net
    projected: Tensor = last(gelu_product(activation.proj, states))
    return projected


def _joins(module: Any, states: Tensor) -> bool:
    """Return whether torch computes the product and the GELU of a feed-forward in one kernel."""
    if type(module) is not FeedForward or len(module.net) != 3:
        return False
    activation, dropout, last = module.net
    return (
        does_as_its_class(module, states)
        and type(activation) is GELU
        and activation.approximate == "tanh"
        and fused.is_untouched(activation)
        and fused.drops_nothing(dropout)
        and type(last) is nn.Linear
        and is_product(activation.proj, states)
    )
