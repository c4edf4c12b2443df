"""Densities fitted to what each step and each layer costs in error."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from svg_attention import Schedule

__all__ = ["FITTED", "Fit", "fit", "is_only", "only", "schedule_of_only", "trials_of_a_fit"]

# In words, and the exponents of steps and of layers, as multiples of the one that follows from the
# curve of error.
_FITTED = {
    "fitted to the steps": ("more where a step was measured to cost more", 1.0, 0.0),
    "fitted steeply to the steps": ("the same, with twice the exponent", 2.0, 0.0),
    "fitted to steps and layers": (
        "more where a step or a layer was measured to cost more",
        1.0,
        0.5,
    ),
}
FITTED: dict[str, str] = {name: words for name, (words, _, _) in _FITTED.items()}
"""How the density goes over steps and layers, once `fit` has measured them -> in words."""

STEP_GROUPS, LAYER_GROUPS = 10, 8
"""The most groups of neighbours that are measured alone."""
_SLOPES = (0.5, 4.0)
_LEAST_SHARE = 0.02
_ONLY = re.compile(r"(steps|layers) (\d+) to (\d+) of (\d+)")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What steps and layers were measured to cost.

    Error adds up over calls, and falls as a power of their density. The least sum at a mean density
    then gives each call a density that goes with its share of the error to the power of
    1 / (1 + slope).

    Attributes:
        steps: share of the error that each step makes; they sum to 1.
        layers: the same of layers.
        slope: how error falls: as density to the power of minus this.
    """

    steps: tuple[float, ...]
    layers: tuple[float, ...]
    slope: float

    def schedule(self, name: str, density: float, *, alike: int = 1) -> Schedule:
        """Return a schedule of a mean density.

        Args:
            name: a key of `FITTED`.
            density: mean over steps and layers.
            alike: steps in a row that read alike, see `SVG2.share_steps`; they need one density.
        """
        _, by_steps, by_layers = _FITTED[name]
        exponent = 1.0 / (1.0 + self.slope)
        factors = None
        if by_layers:
            factors = _points(_spread(self.layers, by_layers * exponent, mean=1.0, most=math.inf))
        groups = [self.steps[i : i + alike] for i in range(0, len(self.steps), alike)]
        steps = [sum(group) / len(group) for group in groups for _ in group]
        return Schedule(
            dense_steps=0.0,
            dense_layers=0.0,
            density=_points(_spread(steps, by_steps * exponent, mean=density, most=1.0)),
            layer_factors=factors,
        )


def fit(
    psnr: Callable[[str, float], float | None],
    *,
    density: float,
    scouts: Sequence[float],
    steps: int,
    layers: int,
) -> Fit:
    """Measure steps and layers.

    Args:
        psnr: returns the dB of a clip in which only some steps or layers are sparse, as `only`
            names them, or of one in which all are, where the name is empty, at a density; None if
            it is identical to the dense one.
        density: of what is sparse.
        scouts: densities that show how error falls.
        steps: of a run.
        layers: of the model.
    """

    def error(name: str, at: float) -> float:
        found = psnr(name, at)
        return 0.0 if found is None or math.isinf(found) else 10.0 ** (-found / 10.0)

    def shares(of: str, count: int, groups: int) -> tuple[float, ...]:
        parts = [
            (range(first, last), error(only(of, first, last, count), density))
            for first, last in _groups(count, groups)
        ]
        least = _LEAST_SHARE * max(part for _, part in parts) or 1.0
        by_one = [max(part, least) / len(group) for group, part in parts for _ in group]
        total = sum(by_one)
        return tuple(one / total for one in by_one)

    low, high = error("", min(scouts)), error("", max(scouts))
    slope = _SLOPES[1]
    if low > 0.0 and high > 0.0:
        slope = math.log(low / high) / math.log(max(scouts) / min(scouts))
    return Fit(
        steps=shares("steps", steps, STEP_GROUPS),
        layers=shares("layers", layers, LAYER_GROUPS),
        slope=min(_SLOPES[1], max(_SLOPES[0], slope)),
    )


def only(of: str, first: int, last: int, count: int) -> str:
    """Name the steps or layers, counted from 0, `last` excluded, that alone are sparse."""
    return f"{of} {first} to {last} of {count}"


def is_only(name: str) -> bool:
    """Return whether a name is one that `only` made."""
    found = _ONLY.fullmatch(name)
    return found is not None and int(found[2]) < int(found[3]) <= int(found[4])


def schedule_of_only(name: str, density: float) -> Schedule:
    """Return the schedule in which all is dense but what `only` named."""
    of, *places = _ONLY.fullmatch(name).groups()  # type: ignore[union-attr]  # checked before
    first, last, count = map(int, places)
    alone = [first <= place < last for place in range(count)]
    if of == "steps":
        return Schedule.sparse([density if one else 1.0 for one in alone])
    # A factor that makes the density 1 makes a layer dense.
    factors = _points([1.0 if one else 1.0 / density for one in alone])
    return Schedule(
        dense_steps=0.0, dense_layers=0.0, density=((0.0, density),), layer_factors=factors
    )


def trials_of_a_fit(steps: int) -> int:
    """Return the most clips that `fit` asks for beside the scouts, which a search makes anyway."""
    return min(steps, STEP_GROUPS) + LAYER_GROUPS


def _points(values: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Return breakpoints of a schedule, one for each value."""
    return tuple((i / len(values), value) for i, value in enumerate(values))


def _groups(count: int, most: int) -> list[tuple[int, int]]:
    """Return first and last, excluded, of groups of neighbours that are about as large."""
    groups = min(count, most)
    edges = [round(i * count / groups) for i in range(groups + 1)]
    return list(itertools.pairwise(edges))


def _spread(shares: Sequence[float], exponent: float, *, mean: float, most: float) -> list[float]:
    """Return values that go with a power of shares, none above `most`, and have a mean."""
    weights = [share**exponent for share in shares]
    low, high = 0.0, 2.0 * mean * len(weights) / sum(weights)
    while sum(min(most, high * w) for w in weights) < mean * len(weights) * (1.0 - 1e-9):
        if all(high * w >= most for w in weights):
            break
        high *= 2.0
    for _ in range(60):
        middle = (low + high) / 2.0
        total = sum(min(most, middle * w) for w in weights)
        low, high = (middle, high) if total < mean * len(weights) else (low, middle)
    return [min(most, high * w) for w in weights]
