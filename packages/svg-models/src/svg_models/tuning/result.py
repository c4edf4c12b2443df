"""What a search found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from svg_models.generation.settings import Settings
from svg_models.recipe import Recipe
from svg_models.summary import Summarised
from svg_models.tuning.fit import Fit
from svg_models.tuning.journal import Trial
from svg_models.tuning.search import Target
from svg_models.tuning.space import Point

__all__ = ["Means", "Tuned"]

Means: TypeAlias = dict[Point, tuple[int, float, float]]
"""A point -> the prompts that it was tried on, mean PSNR in dB, mean cost as a share of dense."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Tuned(Summarised):
    """A recipe that was tuned, and everything that was tried.

    Attributes:
        recipe: what keeps the budget, with what it came to; None if nothing that was tried does.
        point: its place among what was searched.
        target: the budget.
        closest: the point that misses the budget least, or keeps it with most left.
        trials: every point on every prompt that it was tried on, in the order of the search.
        prompts: what was generated.
        settings: of the clips; of the first prompt.
        model: name of the model.
        loras: adapters that it had.
        tokens: video tokens of a clip.
        noise_floor: PSNR in dB of one dense kernel against another; None if they were identical or
            there was no time.
        machine: what it ran on.
        time_by: "seconds" or "density".
        fit: what steps and layers were measured to cost, if that was asked for.
    """

    recipe: Recipe | None
    point: Point | None
    target: Target
    closest: Point | None
    trials: tuple[Trial, ...]
    prompts: tuple[str, ...]
    settings: Settings
    model: str
    loras: tuple[str, ...]
    tokens: int
    noise_floor: float | None
    machine: Mapping[str, Any]
    time_by: str
    fit: Fit | None = None

    def means(self) -> Means:
        """Return, for each point, on how many prompts it was tried, mean PSNR and mean cost.

        Points of a fit, in which little is sparse, are left out. A clip that is identical to the
        dense one counts as 99 dB.
        """
        found: dict[Point, list[Trial]] = {}
        for trial in self.trials:
            if trial.point is not None and not trial.point.only:
                found.setdefault(trial.point, []).append(trial)
        return {
            point: (
                len(trials),
                float(np.mean([99.0 if t.psnr is None else t.psnr for t in trials])),
                float(np.mean([t.cost for t in trials])),
            )
            for point, trials in found.items()
        }

    def frontier(self) -> list[Point]:
        """Return the points on most prompts that no other beats in both, by rising cost."""
        means = self.means()
        most = max((count for count, _, _ in means.values()), default=0)
        best, points = -np.inf, []
        for point, (_, psnr, _cost) in sorted(
            ((p, m) for p, m in means.items() if m[0] == most), key=lambda pair: pair[1][2]
        ):
            if psnr > best:
                best = psnr
                points.append(point)
        return points

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold."""
        return {
            "format": "svg-tuned/1",
            "model": self.model,
            "loras": list(self.loras),
            "tokens": self.tokens,
            "settings": asdict(self.settings),
            "prompts": list(self.prompts),
            "target": asdict(self.target),
            "time_by": self.time_by,
            "machine": dict(self.machine),
            "noise_floor": self.noise_floor,
            "fit": None if self.fit is None else asdict(self.fit),
            "recipe": None if self.recipe is None else self.recipe.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
        }

    def shortfall(self) -> str:
        """Return why there is no recipe, in a sentence; nothing if there is one."""
        if self.recipe is not None:
            return ""
        if self.closest is None:
            return "there was no time for a single trial; give more --budget-minutes"
        count, psnr, cost = self.means()[self.closest]
        wanted = (
            f"{self.target.psnr:g} dB"
            if self.target.psnr is not None
            else f"{1 / (self.target.cost or 1.0):.2f}x"
        )
        return (
            f"nothing that was tried keeps {wanted}; the closest, {self.closest}, came to "
            f"{psnr:.1f} dB at {1 / cost:.2f}x ({count} of {len(self.prompts)} prompts); ask for "
            "less, or give more time"
        )

    def _summary(self) -> tuple[str, list[tuple[str, str]]]:
        rows = [("trials", f"{len(self.trials)} on {len(self.prompts)} prompts of {self.model}")]
        if self.recipe is None:
            return "Tuned: no recipe", [*rows, ("reason", self.shortfall())]
        rows += [("recipe", f"{self.point}")]
        rows += [("measured", f"{one}") for one in self.recipe.measured]
        return "Tuned: a recipe", rows
