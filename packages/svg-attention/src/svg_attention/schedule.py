"""Which steps and layers stay dense, and how dense the sparse ones are."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from svg_attention import config

# 0.49 times 1 / 0.49 is a little below 1.
_ROUNDING = 1e-9


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
        layer_factors: optional factors by which the layers' densities differ: a list of factors,
            one for each layer, or `(fraction of layers done, factor)` breakpoints as above. The
            density of a call is that of its step, or the method's own, times its layer's factor,
            and never more than 1, where the call is dense. With a mean of 1 a step keeps its
            density.

    Raises:
        TypeError: if a value is of the wrong type.
        ValueError: if a fraction, a density or a factor is out of range, or breakpoints do not
            rise.
    """

    dense_steps: float = 0.2
    dense_layers: float = 0.03
    density: tuple[tuple[float, float], ...] | None = None
    layer_factors: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("dense_steps", "dense_layers"):
            checked = config.fraction(name, getattr(self, name), zero=True)
            config.assign(self, **{name: checked})
        if self.density is not None:
            points = _points(self.density, "steps", "density", "densities", config.fraction)
            config.assign(self, density=points)
        if self.layer_factors is not None:
            points = _points(self.layer_factors, "layers", "factor", "factors", config.positive)
            config.assign(self, layer_factors=points)

    @classmethod
    def sparse(cls, density: Iterable[Any] | None = None) -> Schedule:
        """Build the schedule in which no step or layer stays dense, for runs of few steps.

        Args:
            density: see the class.
        """
        return cls(dense_steps=0.0, dense_layers=0.0, density=density)  # type: ignore[arg-type]

    def check_suits(self, method: Any) -> None:
        """Raise unless a method has what this schedule needs of it.

        Raises:
            ValueError: if there are factors by layer, and nothing that they multiply.
        """
        if self.layer_factors is None or self.density is not None:
            return
        if getattr(method, "density", None) is None:
            raise ValueError(
                f"layer_factors multiply a density, and {type(method).__name__} was given none; "
                "give it a density, or the schedule a curve"
            )

    def is_dense(
        self,
        *,
        step: int | None,
        num_steps: int | None,
        layer: int,
        num_layers: int,
        own: float | None = None,
    ) -> bool:
        """Return whether the call at this step and layer stays dense.

        Args:
            step: of the call; None if unknown.
            num_steps: of the run; None if unknown.
            layer: of the call.
            num_layers: of the model.
            own: the method's own density, if it has one.
        """
        if layer < math.floor(self.dense_layers * num_layers):
            return True
        if step is None:
            return True
        density = self.density_at(
            step=step, num_steps=num_steps, layer=layer, num_layers=num_layers, own=own
        )
        # A method whose own density is 1 still plans, unless the schedule says something of it.
        if density == 1.0 and (self.density, self.layer_factors) != (None, None):
            return True
        if num_steps is None:
            return self.dense_steps > 0.0
        return step < math.floor(self.dense_steps * num_steps)

    def is_dense_throughout(
        self, *, step: int | None, num_steps: int | None, num_layers: int, own: float | None = None
    ) -> bool:
        """Return whether every layer of a step stays dense; for the arguments see `is_dense`."""
        # Without factors the last layer is the last to become dense.
        layers = (num_layers - 1,) if self.layer_factors is None else range(num_layers)
        return all(
            self.is_dense(
                step=step, num_steps=num_steps, layer=layer, num_layers=num_layers, own=own
            )
            for layer in layers
        )

    def density_at(
        self,
        *,
        step: int | None,
        num_steps: int | None,
        layer: int | None = None,
        num_layers: int | None = None,
        own: float | None = None,
    ) -> float | None:
        """Return the density of a call, or None if it is the method's own and that is unknown.

        Args:
            step: of the call; None if unknown.
            num_steps: of the run; None if unknown.
            layer: of the call; None asks for the density of the step.
            num_layers: of the model.
            own: the method's own density.
        """
        density = own
        if self.density is not None:
            done = 0.0 if step is None or not num_steps else step / num_steps
            density = _value_at(self.density, done)
        if density is None or self.layer_factors is None or layer is None or not num_layers:
            return density
        density *= _value_at(self.layer_factors, layer / num_layers)
        return 1.0 if density > 1.0 - _ROUNDING else density

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        fields: dict[str, Any] = {
            "dense_steps": self.dense_steps,
            "dense_layers": self.dense_layers,
            "density": None if self.density is None else [list(point) for point in self.density],
        }
        if self.layer_factors is not None:
            fields["layer_factors"] = [list(point) for point in self.layer_factors]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Schedule:
        """Build a schedule from what `to_dict` returned.

        Raises:
            TypeError: if a value is of the wrong type.
            ValueError: if it is out of range, or a key names no field.
        """
        return cls(**config.settings(cls, fields))


def _value_at(points: tuple[tuple[float, float], ...], done: float) -> float:
    """Return the value of breakpoints at a fraction, interpolated between them, held outside."""
    before = points[0]
    for after in points:
        if done <= after[0]:
            span = after[0] - before[0]
            blend = (done - before[0]) / span if span > 0.0 else 1.0
            return before[1] + blend * (after[1] - before[1])
        before = after
    return before[1]


def _points(
    values: Any, of: str, one: str, many: str, check: Callable[[str, Any], float]
) -> tuple[tuple[float, float], ...]:
    """Return breakpoints as pairs of floats; raise unless they are pairs whose fractions rise."""
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        alike = "; one density for every call is a setting of the method" * (one == "density")
        raise TypeError(
            f"expected a list of {many} or of (fraction of {of} done, {one}), got {values!r}{alike}"
        )
    values = list(values)
    if not values:
        raise ValueError(f"a list of {many} needs at least one breakpoint, or None stands for it")
    if all(isinstance(value, numbers.Real) for value in values):
        values = [(i / len(values), value) for i, value in enumerate(values)]
    points = []
    for point in values:
        try:
            done, value = point
        except (TypeError, ValueError):
            raise ValueError(
                f"a {one} breakpoint is (fraction of {of} done, {one}), got {point!r}"
            ) from None
        points.append(
            (
                config.fraction(f"the fraction of a {one} breakpoint", done, zero=True),
                check(f"the {one} of a breakpoint", value),
            )
        )
    if any(later[0] <= earlier[0] for earlier, later in itertools.pairwise(points)):
        raise ValueError(f"the fractions of {one} breakpoints must rise, got {tuple(points)}")
    return tuple(points)
