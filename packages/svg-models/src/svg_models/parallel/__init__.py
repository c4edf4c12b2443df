"""One video on several GPUs."""

from __future__ import annotations

from svg_models.parallel.pipeline import SharedRun, parallelize
from svg_models.parallel.sharing import is_shared, share_of
from svg_models.parallel.ulysses import attend_over_ranks, refuse_parallel

__all__ = [
    "SharedRun",
    "attend_over_ranks",
    "is_shared",
    "parallelize",
    "refuse_parallel",
    "share_of",
]
