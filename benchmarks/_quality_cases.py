"""What `quality.py` measures: methods, schedules and densities, the most telling first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from svg_attention import (
    SVG1,
    SVG2,
    SVGEAR,
    Method,
    RandomBlocks,
    Schedule,
    TokenLayout,
    cluster_counts,
)

# Sides of the embedded model's clips; another judge names its own size.
SIDES = {"tiny": 64, "default": 128, "large": 256}
# Three denoising steps in ten stay dense, as in the published settings of SVG2.
SCHEDULE = Schedule(dense_steps=0.3, dense_layers=0.0)
SCHEDULES = {
    "dense for 30 %": SCHEDULE,
    "dense for 15 %": Schedule(dense_steps=0.15, dense_layers=0.0),
    "dense for 10 %": Schedule(dense_steps=0.1, dense_layers=0.0),
    "no dense step": Schedule(dense_steps=0.0, dense_layers=0.0),
}
# Curves of density in place of dense steps: (share of the steps, times the mean), step by step.
CURVES = {
    "no dense step, first 20 % twice": ((0.2, 2.0), (0.8, 0.75)),
    "no dense step, first 20 % three times": ((0.2, 3.0), (0.8, 0.5)),
    "no dense step, first 40 % 1.6 times": ((0.4, 1.6), (0.6, 0.6)),
    "no dense step, last 40 % 1.6 times": ((0.6, 0.6), (0.4, 1.6)),
}
COMPENSATED: dict[str, Any] = {"compensate": True}
ERROR: dict[str, Any] = {**COMPENSATED, "route": "error"}
BIAS: dict[str, Any] = {**ERROR, "correct_bias": True}
RESIDUAL: dict[str, Any] = {**BIAS, "correct_residual": True}
RESPONSE: dict[str, Any] = {"metric": "response"}
REPAIR: dict[str, Any] = {"repair_rows": 64}
# The guidance branches of a step read alike.
ALIKE: dict[str, Any] = {"share_branches": True}
BASELINE = "error"
BEST = "error, bias, response, repair, alike"
# What presets are made of: as good, and planned half as often.
PRESET = f"{BEST}, 2 steps"
SPENT = f"{PRESET}, spent by error"
SETTINGS: dict[str, dict[str, Any]] = {
    "SVG2": {},
    "compensation": COMPENSATED,
    "SVG-EAR": {},
    BASELINE: ERROR,
    "error, bias": BIAS,
    "error, bias, residual": RESIDUAL,
    "error, bias, repair": {**BIAS, **REPAIR},
    "error, bias, response, repair": {**BIAS, **RESPONSE, **REPAIR},
    BEST: {**BIAS, **RESPONSE, **REPAIR, **ALIKE},
    f"{BEST}, spent by error": {**BIAS, **RESPONSE, **REPAIR, **ALIKE, "spend": "call"},
    **{
        f"{BEST}, {steps} steps": {**BIAS, **RESPONSE, **REPAIR, **ALIKE, "share_steps": steps}
        for steps in (2, 4)
    },
    SPENT: {**BIAS, **RESPONSE, **REPAIR, **ALIKE, "share_steps": 2, "spend": "call"},
    "error, bias, repair, alike, 2 steps": {**BIAS, **REPAIR, **ALIKE, "share_steps": 2},
    "error, bias, 2 steps": {**BIAS, "share_steps": 2},
    "compensation, alike": {**COMPENSATED, **ALIKE},
    "error, alike": {**ERROR, **ALIKE},
    f"{BEST}, 32-row probes": {**BIAS, **RESPONSE, **REPAIR, **ALIKE, "probe_rows": 32},
    "error, response": {**ERROR, **RESPONSE},
    "compensation, first order": {**COMPENSATED, "first_order": True},
}
OTHERS = {"SVG1": SVG1, "random blocks": RandomBlocks}
# Ten rounds of k-means at the start are as good as fifty, see `quality_settings.py`.
FIRST_ITERATIONS = 10


def build(name: str, density: float, tokens: int) -> Method:
    """Return the method of that name at a density of its calls."""
    if name in OTHERS:
        return OTHERS[name](density=density)
    q_clusters, k_clusters = cluster_counts(tokens)
    clustered = SVGEAR if name == "SVG-EAR" else SVG2
    return clustered(
        q_clusters=q_clusters,
        k_clusters=k_clusters,
        first_iterations=FIRST_ITERATIONS,
        density=density,
        **SETTINGS[name],
    )


def probe_density(method: Method, layout: TokenLayout, *, branches: int = 2) -> float:
    """Return what probes and exact rows take, averaged over the calls that read alike."""
    first = method.probe_density(layout)
    if not isinstance(method, SVG2):
        return first
    repair = min(method.repair_rows, layout.video_tokens) / layout.tokens
    return repair + (first - repair) / calls_alike(method, branches=branches)


def calls_alike(method: Method, *, branches: int = 2) -> int:
    """Return how many calls read as one of them chose, where a step has so many branches."""
    if not isinstance(method, SVG2):
        return 1
    return method.share_steps * (branches if method.share_branches else 1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Name one measurement of closeness.

    Attributes:
        size: of the clip.
        steps: denoising steps.
        schedule: which steps are dense.
        method: what runs the others.
        density: pairs of each sparse call, or, where it is `total`, of all calls on average, dense
            steps and the pass of the probes included.
        total: what `density` means.
    """

    size: str
    steps: int
    schedule: str
    method: str
    density: float
    total: bool

    @property
    def group(self) -> str:
        """Name what cases in one table have in common."""
        meaning = "all calls, probes included" if self.total else "sparse calls"
        return f"{self.size} clip, {self.steps} steps, {self.schedule}, density of {meaning}"

    @property
    def key(self) -> str:
        """Name the case."""
        return f"{self.group}: {self.density:g}, {self.method}"

    def schedule_at(self, density: float) -> Schedule:
        """Return the schedule whose sparse calls have a density on average."""
        if self.schedule in SCHEDULES:
            return SCHEDULES[self.schedule]
        parts = ([times] * round(share * self.steps) for share, times in CURVES[self.schedule])
        times = list(itertools.chain(*parts))
        mean = sum(times) / len(times)
        return Schedule.sparse([min(density * one / mean, 1.0) for one in times])

    @property
    def dense_share(self) -> float:
        """Return the share of steps that are dense."""
        if self.schedule in CURVES:
            return 0.0
        return math.floor(SCHEDULES[self.schedule].dense_steps * self.steps) / self.steps

    def sparse_density(self, layout: TokenLayout, *, branches: int = 2) -> float:
        """Return the pairs of each sparse call, of two branches a step under guidance.

        Raises:
            ValueError: if dense steps and probes take more than there is.
        """
        if not self.total:
            return self.density
        left = (self.density - self.dense_share) / (1.0 - self.dense_share)
        method = build(self.method, 0.5, layout.tokens)
        left -= probe_density(method, layout, branches=branches)
        if left <= 0.0:
            raise ValueError("dense steps and probes take more than the density of all calls")
        return left


def cases(
    sizes: tuple[str, ...] = ("default", "large"), *, steps: int | None = None
) -> Iterator[Case | tuple[str, float]]:
    """Yield what is measured, the most telling first.

    A pair of a method and a density asks for the time of a call of it.

    Args:
        sizes: of the clips, by name.
        steps: the only count of denoising steps that the judge was made for, if there is one.
    """

    def some(
        size: str, steps: int, schedule: str, density: float, methods: list[str]
    ) -> Iterator[Case]:
        total = schedule != "dense for 30 %"
        for method in methods:
            yield Case(
                size=size, steps=steps, schedule=schedule, method=method, density=density,
                total=total,
            )  # fmt: skip

    if steps is not None:
        for methods in ([PRESET, BASELINE], [BEST, "compensation"]):
            for size, total in itertools.product(sizes, (0.35, 0.25, 0.5)):
                yield from some(size, steps, "no dense step", total, methods)
        return
    first, *others = sizes
    everything = [*SETTINGS, *OTHERS]
    few = [name for name in SETTINGS if name != "SVG2"]
    # What is asked first: each correction, and the best of them together.
    telling = few[: few.index("error, bias, 2 steps") + 1]
    telling = [name for name in telling if name not in ("SVG-EAR", SPENT)]
    most = [BASELINE, "error, bias, residual", "error, bias, response, repair", BEST]
    most += [f"{BEST}, spent by error", PRESET]
    if first not in SIDES:
        # Another judge. Which density equals today's recipe at 25 %, compensation and routing?
        yield from some(first, 20, "dense for 30 %", 0.25, ["compensation", BASELINE])
        for density in (0.12, 0.10, 0.15, 0.20, 0.05, 0.08):
            yield from some(first, 20, "dense for 30 %", density, [PRESET])
        # Need any step be dense?
        for total in (0.25, 0.35):
            yield from some(first, 8, "no dense step", total, [PRESET, BASELINE])
        for schedule in ("no dense step", "dense for 15 %", "dense for 10 %"):
            yield from some(first, 20, schedule, 0.25, [PRESET, BASELINE])
        for schedule in CURVES:
            yield from some(first, 20, schedule, 0.25, [PRESET])
        yield from some(first, 4, "no dense step", 0.35, [PRESET, BASELINE])
        yield from some(first, 20, "dense for 30 %", 0.12, [BASELINE, BEST])
    for size in sizes:
        for steps, totals in ((20, (0.15, 0.25, 0.35)), (8, (0.25, 0.35, 0.5)), (4, (0.5, 0.65))):
            for total in totals:
                yield from some(size, steps, "no dense step", total, [PRESET])
        for density in (0.1, 0.2, 0.05):
            yield from some(size, 20, "dense for 30 %", density, [PRESET])
    if first in SIDES:
        # What no dense step is held against, and whether a curve beats one density.
        for schedule in ("no dense step", *CURVES, "dense for 10 %", "dense for 15 %"):
            yield from some(first, 20, schedule, 0.25, [SPENT, PRESET])
    for methods in (telling, everything):
        methods_few = [name for name in methods if name in few]
        yield from some(first, 8, "no dense step", 0.25, methods_few)
        yield from some(first, 20, "dense for 30 %", 0.10, methods)
        yield from some(first, 8, "no dense step", 0.35, methods_few)
        yield from some(first, 4, "no dense step", 0.35, methods_few)
        yield from some(first, 20, "no dense step", 0.25, methods_few)
        for schedule in ("dense for 10 %", "dense for 15 %"):
            best = [BEST, f"{BEST}, spent by error"]
            yield from some(first, 20, schedule, 0.25, [BASELINE, "error, bias", *best])
        yield from ((name, density) for density in (0.10, 0.25) for name in methods)
        for size in others:
            large = most if methods is telling else methods_few
            yield from some(size, 8, "no dense step", 0.25, large)
            yield from some(size, 20, "dense for 30 %", 0.10, large)
            yield from some(size, 8, "no dense step", 0.35, large)
            yield from some(size, 20, "dense for 30 %", 0.05, large)
        yield from some(first, 20, "dense for 30 %", 0.20, methods)
        yield from some(first, 20, "dense for 30 %", 0.05, methods)
        yield from ((name, density) for density in (0.05, 0.40) for name in methods)
