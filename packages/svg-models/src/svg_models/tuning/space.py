"""What is searched: the settings of a recipe, an axis for each thing that can be chosen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svg_attention import SVG2, Schedule
from svg_models.caching import NO_CACHE
from svg_models.recipe import Layers, Recipe
from svg_models.tuning.fit import FITTED, Fit, schedule_of_only

__all__ = [
    "ALIKE",
    "AXES",
    "CORRECTIONS",
    "SCHEDULES",
    "START",
    "Point",
    "axes_for",
    "rounded",
]

LEAST, MOST = 0.02, 0.95
"""Densities that are tried."""
FIRST_ROUNDS = 10
"""Of k-means in the first sparse step; ten were as good as fifty on the embedded model."""
FEWEST_CACHED = 12
"""Denoising steps of a video in which caches are tried."""
_WARM_UP = 0.3
_START = 0.6

_ERROR: dict[str, Any] = {"compensate": True, "route": "error"}
_BIAS: dict[str, Any] = {**_ERROR, "correct_bias": True}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "compensation": {"compensate": True},
    "compensation+repair": {"compensate": True, "repair_rows": 64},
    "error": _ERROR,
    "error+bias": _BIAS,
    "error+bias+residual": {**_BIAS, "correct_residual": True},
    "error+bias+repair": {**_BIAS, "repair_rows": 64},
}
"""What stands in for the keys that are not read -> settings of SVG2."""

ALIKE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "branches": {"share_branches": True},
    "two steps": {"share_steps": 2},
    "branches and two steps": {"share_branches": True, "share_steps": 2},
}
"""What reads the same keys -> settings of SVG2."""

_DENSE = {"dense for 10 %": 0.1, "dense for 20 %": 0.2, "dense for 30 %": 0.3}
_WORDS = {
    "none": "no compensation",
    "compensation": "compensation",
    "compensation+repair": "compensation + repair",
    "error": "routed by error",
    "error+bias": "routed by error + bias",
    "error+bias+residual": "routed by error + bias + residual",
    "error+bias+repair": "routed by error + bias + repair",
}

SCHEDULES: dict[str, str] = {
    "flat": "one density in all steps",
    "falling": "from twice the density in the first step to half of it in the last",
    "start at 60 %": "60 % in the first three steps in ten, then the density",
    "dense for 10 %": "the first step in ten dense, then the density",
    "dense for 20 %": "the first two steps in ten dense, then the density",
    "dense for 30 %": "the first three steps in ten dense, then the density",
}
"""How the density goes over the denoising steps -> in words."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One choice on every axis.

    Attributes:
        density: share of the query-key pairs in sparse calls.
        corrections: a key of `CORRECTIONS`.
        schedule: a key of `SCHEDULES` or, once a fit was measured, of `FITTED`.
        probe_rows: see `svg_attention.SVG2`; means nothing unless routed by error.
        metric: see there.
        alike: a key of `ALIKE`.
        spend: see `svg_attention.SVG2`; means nothing unless routed by error.
        cache: steps whose blocks are not computed, see `svg_models.caching`.
        only: what alone is sparse, as `fit.only` names it, to measure its cost; "" for all that the
            schedule says.
    """

    density: float
    corrections: str
    schedule: str
    probe_rows: int = 16
    metric: str = "euclidean"
    alike: str = "nothing"
    spend: str = "tile"
    cache: str = NO_CACHE
    only: str = ""

    @property
    def routed(self) -> bool:
        """Return whether probes read every key."""
        return "route" in CORRECTIONS[self.corrections]

    def replace(self, **changes: Any) -> Point:
        """Return a copy with other choices."""
        return dataclasses.replace(self, **changes)

    def recipe(self, layers: Layers, fit: Fit | None = None) -> Recipe:
        """Return what this runs with.

        Args:
            layers: what computes other layers.
            fit: what fitted schedules are fitted to.
        """
        return Recipe(
            method=SVG2(
                density=self.density,
                probe_rows=self.probe_rows,
                metric=self.metric,  # type: ignore[arg-type]  # checked there
                spend=self.spend,  # type: ignore[arg-type]
                first_iterations=FIRST_ROUNDS,
                **CORRECTIONS[self.corrections],
                **ALIKE[self.alike],
            ),
            schedule=self._schedule(fit),
            layers=layers if self.cache == NO_CACHE else layers.changed(cache=self.cache),
            source="svg tune",
        )

    def _schedule(self, fit: Fit | None) -> Schedule:
        density, name = self.density, self.schedule
        if self.only:
            return schedule_of_only(self.only, density)
        if name in FITTED:
            if fit is None:
                raise ValueError(f"the schedule '{name}' needs a fit, and none was measured")
            alike = ALIKE[self.alike].get("share_steps", 1)
            return fit.schedule(name, density, alike=alike)
        points: tuple[tuple[float, float], ...] | None = None
        dense = 0.0
        if name == "falling":
            points = ((0.0, min(1.0, 2 * density)), (1.0, density / 2))
        elif name == "start at 60 %":
            points = ((0.0, _START), (_WARM_UP - 0.01, _START), (_WARM_UP, density))
        else:
            dense = _DENSE.get(name, 0.0)
        return Schedule(dense_steps=dense, dense_layers=0.0, density=points)

    def __str__(self) -> str:
        """Return the choices for people."""
        words = [f"{100 * self.density:g} %", _WORDS[self.corrections], self.schedule]
        if self.routed and self.probe_rows != 16:
            words.append(f"probes of {self.probe_rows} rows")
        if self.metric != "euclidean":
            words.append(f"{self.metric} metric")
        if self.alike != "nothing":
            words.append(f"{self.alike} alike")
        if self.spend != "tile":
            words.append("spent by error")
        if self.cache != NO_CACHE:
            words.append(f"cache {self.cache}")
        if self.only:
            words.append(f"only {self.only} sparse")
        return ", ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without `only` where it says nothing."""
        values = dataclasses.asdict(self)
        if not self.only:
            del values["only"]
        return values


START = Point(density=0.2, corrections="error+bias+repair", schedule="flat", metric="response")
"""Where a search begins: what was best on the embedded model."""

AXES: Mapping[str, tuple[Any, ...]] = {
    "corrections": tuple(CORRECTIONS),
    "schedule": tuple(SCHEDULES),
    "probe_rows": (16, 32),
    "metric": ("euclidean", "response"),
    "alike": tuple(ALIKE),
    "spend": ("tile", "call"),
    "cache": (NO_CACHE, "first-block@0.05", "first-block@0.1", "first-block@0.2", "taylor@2"),
}
"""What is tried one after the other, each at the best of those before; density is apart."""


def axes_for(steps: int, *, cached: bool = True, guided: bool = True) -> dict[str, tuple[Any, ...]]:
    """Return the axes of a video of so many steps, without schedules that come to the same there.

    With 4 steps, two in ten are none, and three in ten are one. Few steps have none that is like
    the one before, so there is no cache among them.

    Args:
        steps: denoising steps.
        cached: whether the model can have a cache, and was not given one.
        guided: whether a step may have more than one guidance branch.
    """
    schedules: dict[int | str, str] = {}
    for name in SCHEDULES:
        dense = math.floor(_DENSE[name] * steps) if name in _DENSE else name
        schedules.setdefault("flat" if dense == 0 else dense, name)
    caches = AXES["cache"] if cached and steps >= FEWEST_CACHED else (NO_CACHE,)
    alike = tuple(name for name in ALIKE if guided or "branches" not in name)
    return {**AXES, "schedule": tuple(schedules.values()), "alike": alike, "cache": caches}


def rounded(density: float) -> float:
    """Return a density that is worth telling from its neighbours."""
    density = min(MOST, max(LEAST, density))
    return round(density, 2) if density >= 0.1 else round(density * 200) / 200
