"""Feed-forwards whose GELU is the epilogue of the matrix product before it.

The product then writes what the GELU returns, and the widest tensor of a block, which would be
written, read and written again, is written once. It is rounded once, too.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from svg_models.families import fused
from svg_models.families.instance_forward import InstanceForward

__all__ = ["feed_forward"]


def feed_forward(module: Any, states: Tensor) -> Tensor:
    """Compute a feed-forward, in two products where that is what its class comes to.

    Args:
        module: the layer of a block; anything but diffusers' `FeedForward` of a GELU by tanh and
            plain linear layers is called.
        states: `[..., C]`.
    """
    if not _joins(module, states):
        out: Tensor = module(states)
        return out
    activation, _, last = module.net
    proj = activation.proj
    rows = states.flatten(0, -2)
    hidden = torch._addmm_activation(proj.bias, rows, proj.weight.t(), use_gelu=True)
    projected: Tensor = last(hidden.unflatten(0, states.shape[:-1]))
    return projected


def _joins(module: Any, states: Tensor) -> bool:
    """Return whether torch computes the product and the GELU of a feed-forward in one kernel."""
    if not fused.serves_tensor(states) or states.dtype == torch.float32 or torch.version.hip:
        return False
    if type(module) is not FeedForward or len(module.net) != 3 or not _is_own(module, states):
        return False
    activation, dropout, last = module.net
    if type(activation) is not GELU or activation.approximate != "tanh":
        return False
    proj = activation.proj
    return (
        type(dropout) is nn.Dropout
        and (dropout.p == 0.0 or not dropout.training)
        and type(last) is nn.Linear
        and all(fused.is_untouched(part) for part in (activation, dropout))
        and type(proj) is nn.Linear
        and _is_own(proj, states)
        and all(
            type(weight) is nn.Parameter
            and weight.dtype == states.dtype
            and weight.device == states.device
            for weight in (proj.weight, proj.bias)
        )
    )


def _is_own(module: nn.Module, states: Tensor) -> bool:
    """Return whether a module does with `states` what its class does."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, InstanceForward):
        return forward.stands_aside(states) and not fused.is_hooked(module)
    return fused.is_untouched(module)
