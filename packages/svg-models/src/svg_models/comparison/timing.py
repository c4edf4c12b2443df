"""Decide whether a speed can be claimed, and which.

A speed is a ratio of two times, and a wrong one is worse than none. So it is claimed only from
steps that were timed beside the same steps dense, only if what does not differ took equally long,
and never beyond what the share of attention allows.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svg_models.generation.clip import Clip

__all__ = ["NOISE", "Speed", "Timing", "judge"]

OUTSIDE_AGREES = 0.15
"""How far the time outside attention may differ between passes that compute the same there."""
DENSE_REPEATS = 0.25
"""How far the middle half of the dense passes, all of the same work, may spread."""
NOISE = 0.03
"""Below this a difference is none."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a method's steps take beside the same steps dense.

    Attributes:
        speedup: of the whole denoising loop: its steps dense over its steps as they were.
        bound: what it would be if sparse attention took no time (Amdahl); None where sparse steps
            are faster outside attention, too.
        later: steps like the later sparse ones, dense seconds over sparse seconds.
        step: seconds of such a step.
        dense_step: seconds of the same step dense.
        attention: seconds of self-attention in a later sparse step, planning included.
        dense_attention: seconds of self-attention in the same step dense.
    """

    speedup: float
    bound: float | None
    later: float
    step: float
    dense_step: float
    attention: float
    dense_attention: float

    def to_dict(self) -> dict[str, float | None]:
        """Return plain values for JSON."""
        values = asdict(self).items()
        return {name: None if value is None else round(value, 5) for name, value in values}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What can be said about speed.

    Attributes:
        speeds: one per sparse clip, None where none can be claimed.
        reason: why there are none, in a sentence; empty if there are.
    """

    speeds: tuple[Speed | None, ...]
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "reason": self.reason or None,
            "speeds": [None if speed is None else speed.to_dict() for speed in self.speeds],
        }


def judge(clips: Sequence[Clip], *, others: str = "") -> Timing:
    """Decide what the paired steps of sparse clips say about their speed.

    Args:
        clips: sparse, with `paired_steps`.
        others: what else the machine was doing, if it was busy.

    Returns:
        A speed for each clip that has sparse steps, or none for any and the reason.
    """
    measured = [clip for clip in clips if clip.paired_steps]
    reason = _doubt(measured, others)
    speeds = tuple(None if reason or not c.paired_steps else _speed(c) for c in clips)
    for clip, speed in zip(clips, speeds, strict=True):
        if speed is None or speed.bound is None:
            continue
        if speed.speedup > (1 + NOISE) * speed.bound:
            reason = (
                f"{clip.method.title} came out {speed.speedup:.2f}x faster, and attention's share "
                f"of a dense step allows at most {speed.bound:.2f}x"
            )
    if reason:
        return Timing(speeds=(None,) * len(clips), reason=reason)
    return Timing(speeds=speeds, reason="" if measured else "no step of any method was sparse")


def _doubt(clips: Sequence[Clip], others: str) -> str:
    """Return why the times of these clips cannot be compared, or nothing."""
    if others:
        return f"the machine was busy with other work: {others}"
    steps = [step for clip in clips for step in clip.paired_steps]
    if not steps:
        return ""
    dense = sorted(step.dense_seconds for step in steps)
    low, middle, high = _quartiles(dense)
    if high - low > DENSE_REPEATS * middle:
        return (
            f"the same work did not take the same time: dense steps took {dense[0]:.2g} to "
            f"{dense[-1]:.2g} s"
        )
    outside = {
        clip.method.title: statistics.median(s.seconds - s.attention for s in clip.paired_steps)
        for clip in clips
        if _same_layers(clip)
    }
    outside["dense"] = statistics.median(s.dense_seconds - s.dense_attention for s in steps)
    least, most = min(outside, key=outside.__getitem__), max(outside, key=outside.__getitem__)
    if outside[most] > (1 + OUTSIDE_AGREES) * outside[least]:
        return (
            f"time outside attention, the same work for all, was {outside[least]:.2g} s a step "
            f"with {least} and {outside[most]:.2g} s with {most}"
        )
    return ""


def _speed(clip: Clip) -> Speed:
    first = [step for step in clip.paired_steps if step.first]
    later = [step for step in clip.paired_steps if not step.first] or first
    dense = statistics.median(step.dense_seconds for step in later)
    dense_attention = statistics.median(step.dense_attention for step in later)
    # Each step relative to itself dense, so that a slower minute is in both.
    ratio = statistics.median(step.seconds / step.dense_seconds for step in later)
    first_ratio = sum(step.seconds / step.dense_seconds for step in first)
    steps = len(clip.step_seconds)
    sparse = _sparse_steps(clip)
    took = (steps - sparse) + first_ratio + (sparse - len(first)) * ratio
    share = dense_attention / dense
    return Speed(
        speedup=steps / took,
        bound=steps / (steps - sparse * share) if _same_layers(clip) else None,
        later=1 / ratio,
        step=dense * ratio,
        dense_step=dense,
        attention=statistics.median(step.attention for step in later),
        dense_attention=dense_attention,
    )


def _same_layers(clip: Clip) -> bool:
    """Return whether sparse steps compute all but attention as dense ones do."""
    return bool(clip.stats.recipe.get("linears", "bf16") == "bf16")


def _sparse_steps(clip: Clip) -> int:
    table = clip.stats.grids
    return 0 if table is None else int((~table.dense).any(axis=1).sum())


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
