"""The layers of a transformer around its attention, made faster for the length of a run."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from svg_models.families import Family
from svg_models.families.blocks import FusedForward
from svg_models.sparse.checks import check_choice
from svg_models.sparse.linears import Fp8Linears, refuse_device

__all__ = ["FastLayers", "From", "Linears", "check_linears"]

Linears = Literal["bf16", "fp8"]
From = Literal["sparse", "start"]


def check_linears(linears: Any, device: str) -> None:
    """Refuse a precision of products that is unknown or that a device does not have.

    Raises:
        SettingError: if there is no such precision.
        UnsupportedError: if the device or the installation has none.
    """
    check_choice("linears", linears, get_args(Linears))
    if linears == "fp8":
        refuse_device(torch.device(device))


class FastLayers:
    """What a run does to the blocks of one transformer beside their attention.

    Args:
        transformer: the transformer.
        family: its family.
        fuse: compute what stands between the matrix products by kernels that join it.
        linears: "fp8" also computes the products in fp8.
        fp8_from: "sparse" leaves the products of dense steps as they are, "start" none.
    """

    def __init__(
        self,
        transformer: nn.Module,
        family: Family,
        *,
        fuse: bool,
        linears: Linears,
        fp8_from: From,
    ) -> None:
        self._from = fp8_from
        blocks = family.find_blocks(transformer)
        installed = [FusedForward.install(block, rule) for block, rule in blocks] if fuse else []
        self._forwards = [forward for forward in installed if forward is not None]
        self.linears: Fp8Linears | None = None
        if linears == "fp8":
            try:
                self.linears = Fp8Linears(block for block, _ in blocks)
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
