"""Feed-forwards that hold the widest tensor of a block once.

Where the GELU is by tanh it is the epilogue of the matrix product before it: the product writes
what the GELU returns, rounded once, and nothing is read and written again. torch has no epilogue
for the exact GELU, which then takes the place of what it is computed from.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from svg_models.families import fused
from svg_models.families.fp8_rows import Fp8Rows
from svg_models.families.instance_forward import has_known_forward
from svg_models.families.modes import foreign_mode
from svg_models.families.products import does_as_its_class, gelu_product, is_product

__all__ = ["feed_forward"]


def feed_forward(module: Any, states: Tensor | Fp8Rows) -> Tensor:
    """Compute a feed-forward, with its hidden states once where that is what its class comes to.

    Args:
        module: the layer of a block; anything but diffusers' `FeedForward` of a GELU is called.
        states: `[..., C]`.
    """
    if isinstance(states, Fp8Rows) or not _is_of_gelu(module, states):
        out: Tensor = module(states)
        return out
    activation, _, last = module.net
    if activation.approximate == "tanh" and is_product(activation.proj, states):
        hidden = gelu_product(activation.proj, states)
    else:
        hidden = activation.proj(states)
        if _is_its_own(activation.proj) and fused.serves_tensor(hidden):
            import svg_kernels

            svg_kernels.gelu(hidden, approximate=activation.approximate, out=hidden)
        else:
            hidden = activation.gelu(hidden)
    projected: Tensor = last(hidden)
    return projected


def _is_of_gelu(module: Any, states: Tensor) -> bool:
    """Return whether a feed-forward is a product, a GELU and a layer, where kernels serve."""
    if type(module) is not FeedForward or len(module.net) != 3:
        return False
    activation, dropout, last = module.net
    return (
        fused.serves_tensor(states)
        and not torch.compiler.is_compiling()
        and does_as_its_class(module, states)
        and type(activation) is GELU
        and fused.is_untouched(activation)
        and fused.drops_nothing(dropout)
        and type(last) is nn.Linear
    )


def _is_its_own(layer: Any) -> bool:
    """Return whether nobody but its caller gets what a layer returns."""
    plain = type(layer) is nn.Linear and has_known_forward(layer)
    # Hooks on all modules and modes of torch may keep it, too.
    watched = bool(_global_forward_hooks) or foreign_mode() != ""
    return plain and not fused.is_hooked(layer) and not watched
