"""One video on several GPUs."""

from __future__ import annotations

from svg_models.parallel.guidance import SplitGuidance, pass_in_evaluation
from svg_models.parallel.pipeline import SharedRun, parallelize
from svg_models.parallel.share import Share
from svg_models.parallel.sharing import is_shared, share_of
from svg_models.parallel.ulysses import (
    attend_over_ranks,
    begin_over_ranks,
    head_share,
    refuse_parallel,
)

__all__ = [
    "Share",
    "SharedRun",
    "SplitGuidance",
    "attend_over_ranks",
    "begin_over_ranks",
    "head_share",
    "is_shared",
    "parallelize",
    "pass_in_evaluation",
    "refuse_parallel",
    "share_of",
]
