"""What a model needs of a GPU's memory, as it was measured.

The numbers stand in `needs.json` beside this file, which the benchmark of memory writes, and
nowhere else; of a model that nobody has measured nothing is said.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svg_models.errors import SettingError

__all__ = ["CARDS", "CONTEXT", "TABLE", "Need", "measured_models", "needs_of", "read_table"]

TABLE = Path(__file__).with_name("needs.json")
_GIB = 1 << 30
# Memory that torch sees of the usual cards, and what the driver and libraries take of it, GiB.
CARDS = {24: 23.5, 40: 39.4, 48: 44.4, 80: 79.1}
CONTEXT = 0.6
_FORMAT = "svg-needs/1"


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one way of holding a model takes, for one clip.

    Attributes:
        clip: size and frames.
        offload: see `svg_models.loading.placement.OFFLOAD`.
        weights: how the transformer's weights are stored, "bf16" or "fp8".
        steps: what runs: "diffusers", "SVG2", or "SVG2, fp8 products".
        bytes: the most that is taken at once.
        card: the smallest of the usual cards, in GB, that it ran on, or fits on by count where it
            was not run; None for none.
    """

    clip: str
    offload: str
    weights: str
    steps: str
    bytes: float
    card: int | None

    def fits(self, memory: int) -> bool:
        """Return whether it fits on a GPU of so many bytes, as far as that was seen.

        By the bytes alone it may fit on a card where it did not run, since memory falls in pieces.
        """
        failed = (size for card, size in CARDS.items() if self.card is None or card < self.card)
        more = memory > max(failed, default=0.0) * _GIB
        return more and self.bytes + CONTEXT * _GIB <= memory


def needs_of(model: str) -> tuple[Need, ...]:
    """Return what was measured of a model; nothing if nobody has.

    Args:
        model: a hub id, or the part behind its slash.
    """
    wanted = model.strip().casefold()
    return tuple(
        need
        for checkpoints, needs in _rows()
        if any(wanted in (one.casefold(), one.casefold().rpartition("/")[2]) for one in checkpoints)
        for need in needs
    )


def measured_models() -> tuple[str, ...]:
    """Return a name of each model that was measured, the part of a hub id behind its slash."""
    return tuple(checkpoints[0].rpartition("/")[2] for checkpoints, _ in _rows())


@functools.cache
def _rows() -> tuple[tuple[tuple[str, ...], tuple[Need, ...]], ...]:
    if not TABLE.exists():
        return ()
    return read_table(json.loads(TABLE.read_text(encoding="utf-8")))


def read_table(document: Mapping[str, Any]) -> tuple[tuple[tuple[str, ...], tuple[Need, ...]], ...]:
    """Return the names of each model, and what it needs.

    Raises:
        SettingError: if the table is of another format.
    """
    if document.get("format") != _FORMAT:
        raise SettingError(f"expected a table {_FORMAT}, got {document.get('format')!r}")
    return tuple(
        (
            tuple(model["checkpoints"]),
            tuple(Need(clip=model["clip"], **way) for way in model["ways"]),
        )
        for model in document["models"]
    )
