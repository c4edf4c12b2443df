"""What somebody asks of sparse attention in an engine, and which method that is for a clip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from svg_attention import SVG2, Method, Schedule

# What runs where no preset is named, in runs of so many steps or more.
DEFAULT = "balanced"
LEAST_STEPS = 9
_SCHEDULE = Schedule(dense_steps=0.3, dense_layers=0.0)


def _rows(density: float, of_eight: float) -> tuple[tuple[float, Method, Schedule], ...]:
    """Return the rows of a preset, by density: of 9 steps or more, and of 6 to 8."""
    by_steps = ((5, 0.3369, None), (8, of_eight, None), (math.inf, density, _SCHEDULE))
    return tuple(
        (most, SVG2.corrected(share, count_probes=False), schedule or Schedule.sparse())
        for most, share, schedule in by_steps
    )


# The rows of `svg_models.presets` that large models run with, each with the most steps that it is
# for; a test compares them. That package is not asked: it imports diffusers, of which vLLM-Omni and
# SGLang pin versions that it does not take.
PRESETS: Mapping[str, tuple[tuple[float, Method, Schedule], ...]] = {
    "quality": _rows(0.2, 0.3369),
    "balanced": _rows(0.1, 0.2369),
    "fast": _rows(0.05, 0.2369),
}
# Below about this many tokens planning costs more than it saves.
MIN_TOKENS = 12_288


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Say which calls of an engine become sparse, and how sparse.

    Args:
        preset: "quality", "balanced" or "fast": method, density and dense steps that were measured.
            When None, "balanced" in runs of 9 steps or more; shorter ones stay dense.
        density: share of the query-key pairs to compute, in place of the preset's. With it a run of
            fewer steps becomes sparse, too.
        dense_steps: share of the sampling, from its start, that stays dense; the preset's when
            None.
        end: share of the sampling after which it is dense again.
        start_step: first step that is sparse, in place of `dense_steps`, for engines that do not
            say how many steps there are.
        end_steps: last steps that stay dense.
        dense_layers: layers that stay dense, counted from 0.
        min_tokens: shorter sequences stay dense.
        method: what runs in place of the preset's method.
        backend: who computes, as in `svg_attention.sparse_attention`.
        seed: start of all random draws.

    Raises:
        ValueError: if a value is out of its range or the preset unknown.
    """

    preset: str | None = None
    density: float | None = None
    dense_steps: float | None = None
    end: float = 1.0
    start_step: int | None = None
    end_steps: int = 0
    dense_layers: frozenset[int] = frozenset()
    min_tokens: int = MIN_TOKENS
    method: Method | None = None
    backend: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must be above 0 and at most 1, got {self.density}")
        for name in ("dense_steps", "end"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be a share from 0 to 1, got {value}")
        for name in ("start_step", "end_steps", "min_tokens"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Build settings from what an engine's configuration holds.

        Raises:
            ValueError: if a name is unknown; it lists those that are known.
        """
        known = [field.name for field in fields(cls) if field.name != "method"]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}; known are {', '.join(known)}")
        given = dict(values)
        if "dense_layers" in given:
            given["dense_layers"] = layers(given["dense_layers"])
        return cls(**given)

    def choose(self, *, num_steps: int | None) -> tuple[Method, Schedule] | None:
        """Return method and schedule for a clip; None for few steps that nobody asked for.

        Args:
            num_steps: denoising steps; None if unknown.
        """
        asked = (self.preset, self.density, self.method) != (None, None, None)
        if not asked and num_steps is not None and num_steps < LEAST_STEPS:
            return None
        steps = LEAST_STEPS if num_steps is None else num_steps
        rows = PRESETS[self.preset or DEFAULT]
        method, schedule = next(row[1:] for row in rows if steps <= row[0])
        method = self.method or method
        if self.density is not None:
            if not hasattr(method, "density"):
                raise ValueError(f"{method!r} takes no density")
            method = replace(method, density=self.density)  # type: ignore[type-var]
            schedule = replace(schedule, density=None)
        return method, schedule


def layers(
    text: str | int | list[int] | tuple[int, ...] | set[int] | frozenset[int],
) -> frozenset[int]:
    """Return the layers that "0, 1, 47-49" names, or those of a collection.

    Raises:
        ValueError: if a part is neither a number nor two with a dash between them.
    """
    if isinstance(text, int):
        return frozenset({text})
    if not isinstance(text, str):
        return frozenset(int(layer) for layer in text)
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"expected layers such as '0, 1, 47-49', got {part!r}")
        low, high = sorted((int(first), int(last or first)))
        found |= {*range(low, high + 1)}
    return frozenset(found)
