"""SVG-EAR as published: compensation, and routing by the error of scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svg_attention.methods.svg2 import SVG2


@dataclass(frozen=True, kw_only=True, repr=False)
class SVGEAR(SVG2):
    """Read the key clusters whose scores their centroid would replace worst; for comparison.

    Each tile of 128 sorted queries is probed by its mean, where the paper takes the centroid of a
    query cluster. It reads as many keys as SVG2 would, those of the clusters with the largest
    error of scores per key; centroids stand in for the others. Our own `SVG2(compensate=True,
    route="error")` weighs errors by values, too, and probes a tile eight times. Settings that are
    not listed are those of `SVG2`.

    Args:
        compensate: as published.
        route: as published.
        probe_rows: the rows of a tile.

    Source: SVG-EAR, arXiv:2603.08982.
    """

    compensate: bool = True
    route: Literal["mass", "error", "scores"] = "scores"
    probe_rows: int = 128
