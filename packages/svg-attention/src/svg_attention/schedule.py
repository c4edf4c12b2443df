"""Which steps and layers stay dense, and how dense the sparse ones are."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from svg_attention import config


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Decide which attention calls of a generation stay dense.

    The first `floor(dense_steps * num_steps)` steps and the first `floor(dense_layers *
    num_layers)` layers are dense. A call whose step is unknown is dense too, because early steps
    are the ones that sparsity hurts.

    Args:
        dense_steps: fraction of the denoising steps, from the first, in [0, 1].
        dense_layers: fraction of the layers, from the first, in [0, 1].
        density: optional curve of densities, which overrides the method's own density: a list of
            densities, one for each step of a run with as many steps, or `(fraction of steps done,
            density)` breakpoints with rising fractions. Between two of them the density is
            interpolated, outside it is held, so a curve suits any number of steps. Steps of
            density 1 are dense. A list is kept as breakpoints.

    Raises:
        TypeError: if a value is of the wrong type.
        ValueError: if a fraction or a density is out of range, or breakpoints do not rise.
    """

    dense_steps: float = 0.2
    dense_layers: float = 0.03
    density: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("dense_steps", "dense_layers"):
            checked = config.fraction(name, getattr(self, name), zero=True)
            config.assign(self, **{name: checked})
        if self.density is None:
            return
        points = _points(self.density)
        if not points:
            raise ValueError("density needs at least one breakpoint, or None")
        if any(later[0] <= earlier[0] for earlier, later in itertools.pairwise(points)):
            raise ValueError(f"the fractions of density breakpoints must rise, got {points}")
        config.assign(self, density=points)

    @classmethod
    def sparse(cls, density: Iterable[Any] | None = None) -> Schedule:
        """Build the schedule in which no step or layer stays dense, for runs of few steps.

        Args:
            density: see the class.
        """
        return cls(dense_steps=0.0, dense_layers=0.0, density=density)  # type: ignore[arg-type]

    def is_dense(
        self, *, step: int | None, num_steps: int | None, layer: int, num_layers: int
    ) -> bool:
        """Return whether the call at this step and layer stays dense."""
        if layer < math.floor(self.dense_layers * num_layers):
            return True
        if step is None:
            return True
        if self.density_at(step=step, num_steps=num_steps) == 1.0:
            return True
        if num_steps is None:
            return self.dense_steps > 0.0
        return step < math.floor(self.dense_steps * num_steps)

    def density_at(self, *, step: int | None, num_steps: int | None) -> float | None:
        """Return the density asked of this step, or None when the method keeps its own."""
        if self.density is None:
            return None
        done = 0.0 if step is None or not num_steps else step / num_steps
        before = self.density[0]
        for after in self.density:
            if done <= after[0]:
                span = after[0] - before[0]
                blend = (done - before[0]) / span if span > 0.0 else 1.0
                return before[1] + blend * (after[1] - before[1])
            before = after
        return before[1]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        points = None if self.density is None else [list(point) for point in self.density]
        return {
            "dense_steps": self.dense_steps,
            "dense_layers": self.dense_layers,
            "density": points,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Schedule:
        """Build a schedule from what `to_dict` returned.

        Raises:
            TypeError: if a value is of the wrong type.
            ValueError: if it is out of range, or a key names no field.
        """
        return cls(**config.settings(cls, fields))


def _points(density: Any) -> tuple[tuple[float, float], ...]:
    """Return breakpoints as pairs of floats; raise unless they are pairs of fractions."""
    if isinstance(density, (str, bytes)) or not isinstance(density, Iterable):
        raise TypeError(
            f"density must be a list of densities or of (fraction of steps done, density), got "
            f"{density!r}; one density for every step is a setting of the method"
        )
    density = list(density)
    if density and all(isinstance(value, numbers.Real) for value in density):
        density = [(i / len(density), value) for i, value in enumerate(density)]
    points = []
    for point in density:
        try:
            done, value = point
        except (TypeError, ValueError):
            raise ValueError(
                f"a density breakpoint is (fraction of steps done, density), got {point!r}"
            ) from None
        points.append(
            (
                config.fraction("the fraction of a density breakpoint", done, zero=True),
                config.fraction("the density of a breakpoint", value),
            )
        )
    return tuple(points)
