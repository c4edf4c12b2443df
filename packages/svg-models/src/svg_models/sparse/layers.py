"""The layers of a transformer around its attention, made faster for the length of a run."""

from __future__ import annotations

import torch
from torch import nn

from svg_models.families import Family
from svg_models.families.blocks import FusedForward
from svg_models.recipe import Layers
from svg_models.sparse.linears import Fp8Linears, refuse_device

__all__ = ["FastLayers", "check_layers"]


def check_layers(layers: Layers, device: str) -> None:
    """Refuse a precision of products that a device does not have.

    Raises:
        UnsupportedError: if the device or the installation has none.
    """
    if layers.linears == "fp8":
        refuse_device(torch.device(device))


class FastLayers:
    """What a run does to the blocks of one transformer beside their attention.

    Args:
        transformer: the transformer.
        family: its family.
        layers: what to do with them.
    """

    def __init__(self, transformer: nn.Module, family: Family, layers: Layers) -> None:
        self._from = layers.fp8_from
        joined = family.find_blocks(transformer) if layers.fuse else []
        installed = [FusedForward.install(block, rule) for block, rule in joined]
        self._forwards = [forward for forward in installed if forward is not None]
        self.linears: Fp8Linears | None = None
        if layers.linears == "fp8":
            try:
                self.linears = Fp8Linears(family.blocks_of(transformer))
            except BaseException:
                self.remove()
                raise

    def begin_forward(self, *, sparse: bool) -> None:
        """Choose the precision of the products of a forward pass that starts.

        Args:
            sparse: whether its step is one in which attention is sparse.
        """
        if self.linears is not None:
            self.linears.on = sparse or self._from == "start"

    def remove(self) -> None:
        """Leave every layer as it was found."""
        forwards, self._forwards = self._forwards, []
        for forward in forwards:
            forward.remove()
        linears, self.linears = self.linears, None
        if linears is not None:
            linears.remove()
