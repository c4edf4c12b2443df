"""A tiny pipeline of every model family and task, built with nothing from the network.

Each module has the cases of one family in `CASES`.
"""

from __future__ import annotations

from zoo import (
    allegro,
    anyflow,
    chronoedit,
    cogvideox,
    consisid,
    cosmos,
    easyanimate,
    framepack,
    hunyuan_video,
    hunyuan_video15,
    ltx,
    ltx2,
    mochi,
    skyreels,
    wan,
    wan_animate,
)
from zoo.case import Case

__all__ = ["CASES", "Case", "case"]

MODULES = (
    wan,
    hunyuan_video,
    hunyuan_video15,
    cogvideox,
    cosmos,
    ltx,
    ltx2,
    skyreels,
    mochi,
    wan_animate,
    chronoedit,
    allegro,
    consisid,
    easyanimate,
    framepack,
    anyflow,
)
CASES: tuple[Case, ...] = tuple(case for module in MODULES for case in module.CASES)


def case(name: str) -> Case:
    """Return the case of this name."""
    return next(case for case in CASES if case.name == name)
