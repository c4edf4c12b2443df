"""Linear layers whose weights may be read, so that their products write where the next step reads.

A layer is called, not read, wherever anything else has a say in what it does: LoRA, a quantised
weight, fp8, offloading or a hook. `is_product` tells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from svg_models.families import fused
from svg_models.families.instance_forward import InstanceForward

__all__ = [
    "Projection",
    "does_as_its_class",
    "gelu_product",
    "holds_plain_weights",
    "is_product",
    "project_joined",
]


class Projection:
    """A layer and its input, multiplied when the result is needed.

    Args:
        layer: a linear layer, or whatever stands for one.
        states: `[B, S, C]`.
    """

    def __init__(self, layer: Any, states: Tensor) -> None:
        self._layer, self._states = layer, states

    def __call__(self) -> Tensor:
        """Call the layer."""
        out: Tensor = self._layer(self._states)
        return out

    @property
    def width(self) -> int:
        """Channels of the result."""
        return int(self._layer.out_features)

    @property
    def like(self) -> Tensor:
        """A tensor on the device and in the dtype of the result, with its batch and tokens."""
        return self._states

    @property
    def writes_in_place(self) -> bool:
        """Whether `write` may take the place of a call: a plain product of a single clip."""
        return self._states.shape[0] == 1 and is_product(self._layer, self._states)

    def write(self, out: Tensor) -> None:
        """Compute what a call returns into `out`, `[1, S, width]`, contiguous; the same product."""
        layer = self._layer
        torch.addmm(layer.bias, self._states[0], layer.weight.t(), out=out[0])


def project_joined(*projections: Any) -> Tensor:
    """Return what several callables return, `[B, S_i, C]` each, joined along the tokens.

    A `Projection` that may writes where its tokens are in the whole; others are copied there.
    """
    if not all(isinstance(one, Projection) and one.writes_in_place for one in projections):
        return torch.cat([one() for one in projections], dim=1)
    counts = [one.like.shape[1] for one in projections]
    whole: Tensor = projections[0].like.new_empty(1, sum(counts), projections[0].width)
    for one, part in zip(projections, whole.split(counts, dim=1), strict=True):
        one.write(part)
    return whole


def gelu_product(layer: nn.Linear, states: Tensor) -> Tensor:
    """Return the GELU, by tanh, of what a layer returns, which `is_product` beside `states`.

    Args:
        layer: `[C', C]`, with a bias.
        states: `[..., C]`.
    """
    rows = states.flatten(0, -2)
    hidden = torch._addmm_activation(layer.bias, rows, layer.weight.t(), use_gelu=True)
    return hidden.unflatten(0, states.shape[:-1])


def is_product(layer: Any, states: Tensor) -> bool:
    """Return whether a layer is a matrix product and a bias beside `states`, nothing around it."""
    return (
        type(layer) is nn.Linear
        and not torch.compiler.is_compiling()
        and fused.serves_tensor(states)
        and states.dtype != torch.float32
        and not torch.version.hip
        and _autocast_keeps(states)
        and does_as_its_class(layer, states)
        and holds_plain_weights(layer, states)
    )


def holds_plain_weights(layer: Any, states: Tensor) -> bool:
    """Return whether weight and bias of a layer are torch's own, in the dtype of `states`."""
    return all(
        type(weight) is nn.Parameter
        and weight.dtype == states.dtype
        and weight.device == states.device
        for weight in (layer.weight, layer.bias)
    )


def _autocast_keeps(states: Tensor) -> bool:
    """Return whether a layer's product has the dtype of `states`."""
    kind = states.device.type
    return not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == states.dtype


def does_as_its_class(module: nn.Module, states: Tensor) -> bool:
    """Return whether a module does with `states` what its class does."""
    forward = InstanceForward.at(module)
    if forward is not None:
        return forward.stands_aside(states) and not fused.is_hooked(module)
    return fused.is_untouched(module)
