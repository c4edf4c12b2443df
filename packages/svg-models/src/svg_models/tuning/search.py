"""Find the settings that keep a budget with few trials.

The search knows no model: it is given what a point came to. It goes down one axis after the other
(coordinate descent), each choice judged by how far it lies above the frontier that the best so far
has between quality and cost; then density is moved until the budget is just kept. All that is done
on one prompt. The best few lines then meet more prompts, and half of them are dropped each time
(successive halving), before density is corrected once more on all prompts.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from svg_models.tuning.space import AXES, LEAST, MOST, START, Point, rounded

__all__ = ["Outcome", "OutOfTime", "Search", "Target", "most_trials"]

SCOUTS = (0.1, 0.2, 0.4)
"""Densities that show how quality and cost go together."""
SWEEPS = 2
FINALISTS = 4
STEPS_TO_TARGET = 3
LAST_STEPS = 4
CLOSE_DB, CLOSE_COST = 0.4, 0.07
"""How near to its budget a point is good enough; cost as a share of the budget."""
IDENTICAL = 99.0
"""Decibels that stand for a clip which does not differ."""


class OutOfTime(Exception):
    """Ends a search; what it has found so far counts."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a point came to, on average over some prompts.

    Attributes:
        psnr: dB against dense.
        cost: share of what dense costs.
    """

    psnr: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class Target:
    """The budget: a least quality, or a largest cost.

    Attributes:
        psnr: dB against dense to reach at the least cost; or None.
        cost: share of dense to stay below at the best quality; or None.
    """

    psnr: float | None = None
    cost: float | None = None

    def met(self, outcome: Outcome) -> bool:
        """Return whether an outcome keeps the budget."""
        if self.psnr is not None:
            return outcome.psnr >= self.psnr
        return outcome.cost <= (self.cost or 0.0)

    def value(self, outcome: Outcome) -> float:
        """Return how good an outcome that keeps the budget is; larger is better."""
        return -outcome.cost if self.psnr is not None else outcome.psnr

    def excess(self, outcome: Outcome) -> float:
        """Return by how much it misses the budget, negative, or has left of it, in its unit."""
        if self.psnr is not None:
            return outcome.psnr - self.psnr
        return (self.cost or 0.0) - outcome.cost

    def close(self, outcome: Outcome) -> bool:
        """Return whether hardly anything of the budget is left."""
        near = CLOSE_COST * (self.cost or 0.0) if self.psnr is None else CLOSE_DB
        return 0 <= self.excess(outcome) <= near


Evaluate = Callable[[Point, int], Outcome]


class Search:
    """A search for the best point within a budget.

    Args:
        target: the budget.
        evaluate: returns what a point came to over the first so many prompts; may raise
            `OutOfTime`. It is asked for the same twice, so it remembers.
        prompts: how many there are.
        start: where to begin.
        axes: what may be chosen, in the order in which it is.
    """

    def __init__(
        self,
        target: Target,
        evaluate: Evaluate,
        *,
        prompts: int,
        start: Point = START,
        axes: Mapping[str, tuple[Any, ...]] = AXES,
    ) -> None:
        self._target, self._ask, self._prompts = target, evaluate, prompts
        self._start, self._axes = start, axes
        self._found: dict[int, dict[Point, Outcome]] = {}

    def run(self) -> Point | None:
        """Search; return the best point that keeps the budget, or None."""
        with contextlib.suppress(OutOfTime):
            self._search()
        return self.best()

    def best(self) -> Point | None:
        """Return the best point that keeps the budget on the most prompts that any was tried on."""
        for count in sorted(self._found, reverse=True):
            kept = {p: o for p, o in self._found[count].items() if self._target.met(o)}
            if kept:
                return max(kept, key=lambda point: self._target.value(kept[point]))
            if count == self._prompts:
                return None  # what fewer prompts promised did not hold
        return None

    def closest(self) -> tuple[Point, Outcome] | None:
        """Return the point that misses the budget least, on the most prompts."""
        for count in sorted(self._found, reverse=True):
            found = self._found[count]
            point = max(found, key=lambda p: self._target.excess(found[p]))
            return point, found[point]
        return None

    def _search(self) -> None:
        for density in SCOUTS:
            self._evaluate(self._start.replace(density=density), 1)
        line = self._nearest(self._start, 1)
        for _ in range(SWEEPS):
            before = line
            for axis in self._axes:
                line = self._best_along(axis, line)
            line = self._to_target(line, 1, STEPS_TO_TARGET)
            if line.replace(density=0.5) == before.replace(density=0.5):
                break
        finalists = self._finalists(line)
        for count in _rungs(self._prompts):
            for point in finalists:
                self._evaluate(point, count)
            finalists = sorted(finalists, key=lambda p: -self._advantage(p, count))
            finalists = finalists[: max(1, len(finalists) // 2)]
        self._to_target(finalists[0], self._prompts, LAST_STEPS)

    def _evaluate(self, point: Point, count: int) -> Outcome:
        outcome = self._ask(point, count)
        capped = Outcome(psnr=min(outcome.psnr, IDENTICAL), cost=outcome.cost)
        self._found.setdefault(count, {})[point] = capped
        return capped

    def _best_along(self, axis: str, line: Point) -> Point:
        """Return the best choice on one axis, all others as they are."""
        choices = [line]
        for value in self._axes[axis]:
            point = line.replace(**{axis: value})
            if point != line and _sensible(point):
                choices.append(point)
        for point in choices:
            self._evaluate(point, 1)
        return max(choices, key=lambda point: self._advantage(point, 1))

    def _advantage(self, point: Point, count: int) -> float:
        """Return the quality of a point at equal cost, in dB: what cost buys is taken off."""
        outcome = self._found[count][point]
        return outcome.psnr - self._rate() * math.log2(max(outcome.cost, 1e-4))

    def _rate(self) -> float:
        """Return what twice the cost buys in dB, along the line of the start."""
        line = self._line(self._start, 1)
        points = [(math.log2(max(o.cost, 1e-4)), o.psnr) for _, o in line]
        slopes = [
            (b[1] - a[1]) / (b[0] - a[0])
            for a, b in itertools.pairwise(points)
            if b[0] - a[0] > 1e-3
        ]
        mean = sum(slopes) / len(slopes) if slopes else 5.0
        return min(15.0, max(1.0, mean))

    def _line(self, line: Point, count: int) -> list[tuple[float, Outcome]]:
        """Return density and outcome of the points that differ from one by density alone."""
        found = self._found.get(count, {})
        alike = line.replace(density=0.5)
        return sorted(
            ((p.density, o) for p, o in found.items() if p.replace(density=0.5) == alike),
            key=lambda pair: pair[0],
        )

    def _nearest(self, line: Point, count: int) -> Point:
        """Return the point of a line whose outcome is nearest to the budget."""
        known = self._line(line, count)
        density, _ = min(known, key=lambda pair: abs(self._target.excess(pair[1])))
        return line.replace(density=density)

    def _to_target(self, line: Point, count: int, tries: int) -> Point:
        """Move density along a line until the budget is just kept; return the best point."""
        self._evaluate(line, count)
        for _ in range(tries):
            density = self._next_density(line, count)
            if density is None:
                break
            self._evaluate(line.replace(density=density), count)
        known = self._line(line, count)
        kept = [(d, o) for d, o in known if self._target.met(o)]
        if not kept:
            return self._nearest(line, count)
        best, _ = max(kept, key=lambda pair: self._target.value(pair[1]))
        return line.replace(density=best)

    def _next_density(self, line: Point, count: int) -> float | None:
        """Return the density to try next, or None if the best one is known."""
        known = self._line(line, count)
        if any(self._target.close(o) for _, o in known):
            return None
        # More density is more quality and more cost.
        enough = [(d, o) for d, o in known if self._dense_enough(o)]
        too_sparse = [(d, o) for d, o in known if not self._dense_enough(o)]
        tried = {density for density, _ in known}
        if enough and too_sparse:
            (low, below), (high, above) = max(too_sparse)[:2], min(enough, key=lambda p: p[0])
            if low >= high:
                return None
            a, b = self._target.excess(below), self._target.excess(above)
            part = min(0.9, max(0.1, a / (a - b))) if a != b else 0.5
            # Where it should be, or in the middle if that was tried: rounding is coarse below 10 %.
            places = (math.log(low) + p * (math.log(high) - math.log(low)) for p in (part, 0.5))
            return next((d for d in map(rounded, map(math.exp, places)) if d not in tried), None)
        edge = min(tried) / 1.6 if enough else max(tried) * 1.6
        density = rounded(edge)
        return None if density in tried else density

    def _dense_enough(self, outcome: Outcome) -> bool:
        """Return whether less density is the way to the budget."""
        return self._target.met(outcome) == (self._target.psnr is not None)

    def _finalists(self, line: Point) -> list[Point]:
        """Return the best lines, each at the density at which it should just keep the budget."""
        found = self._found[1]
        ranked = sorted(found, key=lambda p: -self._advantage(p, 1))
        lines: dict[Point, Point] = {line.replace(density=0.5): line}
        for point in ranked:
            alike = point.replace(density=0.5)
            if alike not in lines and len(lines) < FINALISTS:
                lines[alike] = point.replace(density=self._predicted(point))
        return list(lines.values())

    def _predicted(self, point: Point) -> float:
        """Return the density at which a point should just keep the budget."""
        outcome = self._found[1][point]
        rate = self._rate()
        if self._target.psnr is not None:
            doublings = (self._target.psnr - outcome.psnr) / rate
        else:
            doublings = math.log2((self._target.cost or 1.0) / max(outcome.cost, 1e-4))
        return rounded(point.density * 2.0 ** max(-2.0, min(2.0, doublings)))


def most_trials(prompts: int) -> int:
    """Return the largest number of trials, of one point on one prompt each, of a search."""
    sweep = sum(len(values) - 1 for values in AXES.values()) + STEPS_TO_TARGET
    on_one = len(SCOUTS) + SWEEPS * sweep
    more, left, before = 0, FINALISTS, 1
    for count in _rungs(prompts):
        more += left * (count - before if count > before else 0)
        left, before = max(1, left // 2), count
    return on_one + more + LAST_STEPS * prompts


def _rungs(prompts: int) -> tuple[int, ...]:
    """Return on how many prompts the finalists are compared, one time after the other."""
    return tuple(sorted({-(-prompts // 2), prompts}))


def _sensible(point: Point) -> bool:
    """Return whether a point is unlike its neighbours."""
    if not point.routed and (point.probe_rows != 16 or point.spend != "tile"):
        return False
    if "residual" in point.corrections and point.alike != "nothing":
        return False  # whose probes those that read alike spare
    if point.schedule == "start at 60 %" and point.density >= 0.6:
        return False
    return LEAST <= point.density <= MOST
