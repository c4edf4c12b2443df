"""The numbers of a comparison, a row for each clip."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from svg_models.report.render import decibels, gibibytes, percent, seconds

if TYPE_CHECKING:
    from svg_models.comparison.candidate import Candidate
    from svg_models.comparison.timing import Speed
    from svg_models.generation.clip import Clip

__all__ = ["COLUMNS", "cells", "dense_cells"]

NOTHING = "–"
AGREES = 0.15
"""How far whole clips may differ from the speed that their steps showed."""

COLUMNS = (
    ("Density,", "sparse calls"),
    ("Recall,", "sampled"),
    ("PSNR,", "mean"),
    ("PSNR,", "worst frame"),
    ("SSIM,", "mean"),
    ("FLIP,", "mean"),
    ("Attention,", "one step"),
    ("One", "step"),
    ("Denoising", "speed-up"),
    ("Whole clip,", "with decoding"),
    ("Peak", "memory"),
)


def dense_cells(dense: Clip, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Return the row of the dense clip; its times are the dense half of the pairs."""
    speeds = [c.speed for c in candidates if c.speed is not None]
    times = [NOTHING] * 3
    if speeds:
        attention = statistics.median(speed.dense_attention for speed in speeds)
        step = statistics.median(speed.dense_step for speed in speeds)
        times = [seconds(attention), seconds(step), "1.00×"]
    whole = seconds(dense.total_seconds) if _whole_agree(dense, candidates) else NOTHING
    words = [
        percent(1.0),
        percent(1.0),
        *[NOTHING] * 4,
        *times,
        whole,
        gibibytes(dense.peak_memory),
    ]
    return [{"text": text} for text in words]


def cells(
    candidate: Candidate, dense: Clip, candidates: Sequence[Candidate]
) -> list[dict[str, Any]]:
    """Return the row of a sparse clip."""
    close, clip, speed = candidate.similarity, candidate.clip, candidate.speed
    others = [c.similarity for c in candidates]
    recalls = [c.clip.recall for c in candidates if c.clip.recall is not None]
    speeds = [c.speed.speedup for c in candidates if c.speed is not None]
    whole = seconds(clip.total_seconds) if _whole_agree(dense, candidates) else NOTHING
    return [
        {"text": percent(clip.stats.mean_density)},
        _best(clip.recall, recalls, percent),
        _best(close.mean_psnr, [c.mean_psnr for c in others], decibels),
        _best(close.worst_psnr, [c.worst_psnr for c in others], decibels),
        _best(close.mean_ssim, [c.mean_ssim for c in others], "{:.3f}".format),
        _best(close.mean_flip, [c.mean_flip for c in others], "{:.3f}".format, least=True),
        *_times(speed),
        _best(None if speed is None else speed.speedup, speeds, "{:.2f}×".format),
        {"text": whole},
        {"text": gibibytes(clip.peak_memory)},
    ]


def _times(speed: Speed | None) -> list[dict[str, Any]]:
    if speed is None:
        return [{"text": NOTHING}] * 2
    return [{"text": seconds(speed.attention)}, {"text": seconds(speed.step)}]


def _whole_agree(dense: Clip, candidates: Sequence[Candidate]) -> bool:
    """Return whether whole clips took as long, beside each other, as their steps say they must.

    Each was made once, minutes apart, so their seconds alone would say anything.
    """
    clips = [dense, *(c.clip for c in candidates)]
    if any(clip.seconds <= 0 or clip.total_seconds <= 0 for clip in clips):
        return False
    if not candidates or any(c.speed is None for c in candidates):
        return False
    ratios = (
        (dense.seconds / c.clip.seconds) / c.speed.speedup
        for c in candidates
        if c.speed is not None
    )
    return all(abs(ratio - 1) <= AGREES for ratio in ratios)


def _best(
    value: float | None,
    column: Sequence[float],
    write: Callable[[float], str],
    *,
    least: bool = False,
) -> dict[str, Any]:
    if value is None:
        return {"text": NOTHING}
    best = len(column) > 1 and value == (min if least else max)(column)
    return {"text": write(value), "best": best}
