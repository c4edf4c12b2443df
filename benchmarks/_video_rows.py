"""The runs whose seconds `bench_video.py` puts together from the parts that it has timed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from _video_parts import DENSE, FEW, FIRST, FP8, OURS, OUT, SHARED, SPARSE, STOCK

from svg_models.recipe import last_steps


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run that is put together from parts.

    Attributes:
        name: for people.
        dense: part whose steps run before attention is sparse, and their kind.
        sparse: part whose steps run after; None if none is sparse.
        steps: denoising steps; None for the published number.
        warm: share of the steps that stay dense; None for the published one.
        fp8: for people: what is in fp8.
        last: part whose steps the last ones are, if they keep their precision.
        cached: part whose cache leaves steps out.
    """

    name: str
    dense: tuple[str, str] | None
    sparse: str | None = None
    steps: int | None = None
    warm: float | None = None
    fp8: str = ""
    last: str = ""
    cached: str | None = None

    @property
    def stock(self) -> str:
        """Name of the row of diffusers with as many steps."""
        return "diffusers" if self.steps is None else f"diffusers, {self.steps} steps"


BOTH = "products and attention"
MOST = "of sparse steps but the last two"
ROWS = (
    Row(name="diffusers", dense=("diffusers", STOCK)),
    Row(name="diffusers, compiled", dense=("diffusers, compiled", STOCK)),
    Row(name="diffusers, torchao fp8", dense=("diffusers, torchao fp8", STOCK), fp8="products"),
    Row(name="dense", dense=(OURS, DENSE)),
    Row(name=OURS, dense=(OURS, DENSE), sparse=OURS),
    Row(name=SHARED, dense=(OURS, DENSE), sparse=SHARED),
    Row(name="SVG2, compiled", dense=(OURS, DENSE), sparse="SVG2, compiled"),
    Row(name=f"{SHARED}, compiled", dense=(OURS, DENSE), sparse=f"{SHARED}, compiled"),
    *(
        Row(
            name=name,
            dense=(OURS, DENSE),
            sparse=name,
            fp8=f"products {MOST}",
            last=OURS,
        )
        for name in (
            "SVG2, fp8 products",
            "SVG2, fp8 products, compiled",
            f"{SHARED}, fp8 products",
        )
    ),
    Row(
        name="SVG2, fp8",
        dense=(OURS, DENSE),
        sparse=FP8,
        fp8=f"{BOTH} {MOST}",
        last=OURS,
    ),
    Row(name="SVG2, fp8 from the start", dense=(FP8, DENSE), sparse=FP8, fp8=f"{BOTH}, all steps"),
    Row(
        name="SVG2, fp8, taylor@2",
        dense=(OURS, DENSE),
        sparse=FP8,
        fp8=f"{BOTH} {MOST}",
        last=OURS,
        cached="SVG2, fp8, taylor@2",
    ),
    Row(name="no dense step, fp8", dense=None, sparse=FEW, warm=0.0, fp8=f"{BOTH}, all steps"),
    Row(name="diffusers, 8 steps", dense=("diffusers", STOCK), steps=8),
    Row(name="8 sparse steps, fp8", dense=None, sparse=FEW, steps=8, warm=0.0, fp8=BOTH),
    Row(name="diffusers, 4 steps", dense=("diffusers", STOCK), steps=4),
    Row(name="4 sparse steps, fp8", dense=None, sparse=FEW, steps=4, warm=0.0, fp8=BOTH),
)


def step_seconds(taken: Mapping[str, Any], passes: int) -> dict[str, float]:
    """Return the seconds of a guided step of each kind.

    The first step of a run has the start of a process at a new size in it, so it does not count
    where there is another of its kind.

    Args:
        taken: of a run.
        passes: of a guided step.
    """
    by_kind: dict[str, list[float]] = {}
    for step in taken["steps"]:
        seconds = passes / len(step["passes"]) * sum(step["passes"])
        by_kind.setdefault(step["kind"], []).append(seconds)
    first = by_kind[taken["steps"][0]["kind"]]
    if len(first) > 1:
        del first[0]
    return {kind: statistics.median(seconds) for kind, seconds in by_kind.items()}


def is_measured(taken: Mapping[str, Any] | None) -> bool:
    """Return whether a part is stored and had not failed."""
    return taken is not None and "unavailable" not in taken


def seconds_of(stored: Mapping[str, Any], row: Row) -> dict[str, float] | None:
    """Return the seconds of the parts of a row, or None if a part of it is not measured.

    Args:
        stored: what is known of a video.
        row: which run.
    """
    parts = stored["parts"]
    steps = row.steps or stored["published_steps"]
    first = parts.get("diffusers")
    if not is_measured(first):
        return None

    def cost(part: str, kind: str) -> float | None:
        taken = parts.get(part)
        if not is_measured(taken):
            return None
        seconds = step_seconds(taken, stored["passes"]).get(kind)
        return None if seconds is None else float(seconds + taken["between"])

    warm = stored["dense_steps"] if row.warm is None else row.warm
    before = steps if row.sparse is None else math.floor(warm * steps)
    out = [row.cached is not None and is_left_out(step) for step in range(steps)]
    after = steps - before - sum(out[before:])
    left = sum(out)
    before -= sum(out[:before])
    starts = 0 if row.sparse is None else min(stored["transformers"], after)
    precise = last_steps(steps) - sum(out[steps - last_steps(steps) :]) if row.last else 0
    after -= starts + precise
    amounts = [(before, *row.dense) if row.dense else (0, "", "")]
    if row.sparse:
        amounts += [(starts, row.sparse, FIRST), (after, row.sparse, SPARSE)]
        amounts += [(precise, row.last, SPARSE)]
    found = []
    for count, part, kind in amounts:
        one = cost(part, kind) if count else 0.0
        if one is None:
            return None
        found.append(count * one)
    if row.cached is not None:
        one = cost(row.cached, OUT)
        if one is None:
            return None
        found[2] += left * one
    found += [0.0] * (4 - len(found))
    return {
        "start": first["start"],
        "dense steps": found[0],
        "first sparse step": found[1],
        "sparse steps": found[2] + found[3],
        "decoding": decoding_of(stored, row),
    }


def decoding_of(stored: Mapping[str, Any], row: Row) -> float:
    """Return the seconds of decoding, by our kernels in a row of ours if that is measured."""
    ours = row.sparse is not None or (row.dense is not None and row.dense[1] != STOCK)
    taken = stored["parts"].get(OURS) if ours else None
    if not is_measured(taken) or taken["decoding"] is None:
        taken = stored["parts"]["diffusers"]
    return float(taken["decoding"])


def is_left_out(step: int) -> bool:
    """Return whether the cache "taylor@2" leaves a step out: behind three, every second one."""
    return step >= 3 and step % 2 == 1


def run_whole(stored: Mapping[str, Any], row: Row) -> dict[str, float] | None:
    """Return the seconds of the parts of a row whose every step was run; None for another."""
    taken = stored["whole"].get(row.name)
    if row.steps is not None or not is_measured(taken):
        return None
    sums = dict.fromkeys((STOCK, DENSE, FIRST, SPARSE), 0.0)
    for step in taken["steps"]:
        sums[step["kind"]] += sum(step["passes"]) + taken["between"]
    return {
        "start": taken["start"],
        "dense steps": sums[STOCK] + sums[DENSE],
        "first sparse step": sums[FIRST],
        "sparse steps": sums[SPARSE],
        "decoding": taken["decoding"],
    }


def known(stored: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of every row of which all parts are measured."""
    sums = {row.name: seconds_of(stored, row) for row in ROWS}
    return {name: sum(parts.values()) for name, parts in sums.items() if parts is not None}
