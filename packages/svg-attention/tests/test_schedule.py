from __future__ import annotations

import json

import pytest

from svg_attention import Schedule


@pytest.mark.parametrize(
    ("fraction", "count", "dense"), [(0.2, 40, 8), (0.3, 35, 10), (0.0, 9, 0), (1.0, 9, 9)]
)
def test_is_dense_for_the_first_steps_and_layers(fraction: float, count: int, dense: int) -> None:
    by_step = Schedule(dense_steps=fraction, dense_layers=0.0)
    by_layer = Schedule(dense_steps=0.0, dense_layers=fraction)
    steps = [by_step.is_dense(step=i, num_steps=count, layer=0, num_layers=5) for i in range(count)]
    layers = [
        by_layer.is_dense(step=0, num_steps=5, layer=i, num_layers=count) for i in range(count)
    ]
    assert steps == layers == [True] * dense + [False] * (count - dense)


def test_is_dense_for_an_unknown_step() -> None:
    assert Schedule(dense_steps=0.0).is_dense(step=None, num_steps=None, layer=5, num_layers=9)
    assert Schedule(dense_steps=0.1).is_dense(step=8, num_steps=None, layer=5, num_layers=9)
    never = Schedule(dense_steps=0.0, dense_layers=0.0)
    assert not never.is_dense(step=8, num_steps=None, layer=5, num_layers=9)


def test_density_at_interpolates_between_breakpoints_and_holds_outside() -> None:
    schedule = Schedule(density=((0.25, 0.5), (0.75, 0.1)))
    asked = [schedule.density_at(step=step, num_steps=8) for step in range(8)]
    assert asked == pytest.approx([0.5, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    assert Schedule().density_at(step=3, num_steps=8) is None


def test_density_at_follows_a_list_and_stretches_it_to_other_numbers_of_steps() -> None:
    densities = [1.0, 0.6, 0.4, 0.2]
    schedule = Schedule.sparse(densities)
    for factor in (1, 2):
        steps = 4 * factor
        asked = [schedule.density_at(step=i, num_steps=steps) for i in range(steps)]
        assert asked[::factor] == pytest.approx(densities)
    # Halves of the way between neighbours; the last is held.
    assert asked[1::2] == pytest.approx([0.8, 0.5, 0.3, 0.2])
    assert schedule.density_at(step=1, num_steps=2) == pytest.approx(0.4)


def test_is_dense_where_the_density_of_a_step_is_1() -> None:
    schedule = Schedule.sparse([1.0, 1.0, 0.5, 0.2])
    dense = [schedule.is_dense(step=i, num_steps=8, layer=0, num_layers=3) for i in range(8)]
    assert dense == [True] * 3 + [False] * 5


def test_density_at_is_that_of_the_step_times_the_factor_of_the_layer() -> None:
    schedule = Schedule(
        dense_steps=0.0, dense_layers=0.0, density=[0.4, 0.2], layer_factors=[2.0, 0.5, 1.0, 4.0]
    )
    found = [
        [
            schedule.density_at(step=step, num_steps=2, layer=layer, num_layers=4)
            for layer in range(4)
        ]
        for step in range(2)
    ]
    assert found == [pytest.approx([0.8, 0.2, 0.4, 1.0]), pytest.approx([0.4, 0.1, 0.2, 0.8])]
    assert schedule.density_at(step=0, num_steps=2) == 0.4
    dense = [
        schedule.is_dense(step=0, num_steps=2, layer=layer, num_layers=4) for layer in range(4)
    ]
    assert dense == [False, False, False, True]
    assert not schedule.is_dense_throughout(step=0, num_steps=2, num_layers=4)


def test_is_dense_throughout_counts_dense_layers_and_the_methods_own_density() -> None:
    place = {"step": 0, "num_steps": 2, "num_layers": 4}
    schedule = Schedule(dense_steps=0.0, dense_layers=0.25, layer_factors=[0.5, 4.0, 4.0, 4.0])
    assert schedule.is_dense_throughout(own=0.3, **place)
    assert not schedule.is_dense_throughout(own=0.2, **place)
    assert not schedule.is_dense_throughout(**place)
    assert Schedule(dense_steps=0.0, dense_layers=1.0).is_dense_throughout(own=0.3, **place)
    # Nothing was said of the density, so a method of density 1 plans.
    assert not Schedule.sparse().is_dense_throughout(own=1.0, **place)


@pytest.mark.parametrize("density", [0.3, 0.49, 0.057])
@pytest.mark.parametrize("layers", [6, 28])
def test_is_dense_where_a_factor_makes_the_density_1_but_for_rounding(
    density: float, layers: int
) -> None:
    factors = [1.0 if layer == 1 else 1.0 / density for layer in range(layers)]
    schedule = Schedule(dense_steps=0.0, dense_layers=0.0, density=[density], layer_factors=factors)
    dense = [
        schedule.is_dense(step=0, num_steps=2, layer=layer, num_layers=layers)
        for layer in range(layers)
    ]
    assert dense == [layer != 1 for layer in range(layers)]


def test_density_at_with_factors_alone_is_relative_to_the_methods_own() -> None:
    schedule = Schedule(dense_steps=0.0, dense_layers=0.0, layer_factors=((0.0, 2.0), (0.5, 1.0)))
    place = {"step": 3, "num_steps": 8, "num_layers": 4}
    found = [schedule.density_at(layer=layer, own=0.3, **place) for layer in range(4)]
    assert found == pytest.approx([0.6, 0.45, 0.3, 0.3])
    assert schedule.density_at(layer=0, **place) is None
    assert not schedule.is_dense(layer=0, **place)


def test_to_dict_and_back_is_the_same_schedule() -> None:
    for schedule in (
        Schedule(),
        Schedule(dense_steps=0.1, density=((0.0, 0.5), (1.0, 0.2))),
        Schedule.sparse([0.5, 0.25, 0.1]),
        Schedule(layer_factors=[1.5, 0.5]),
    ):
        assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dense_steps": 1.2}, "dense_steps must lie"),
        ({"dense_layers": -0.1}, "dense_layers must lie"),
        ({"density": ()}, "at least one breakpoint"),
        ({"density": ((0.5, 0.3), (0.5, 0.2))}, "must rise"),
        ({"density": [0.5, (0.6, 0.2)]}, "a density breakpoint is"),
        ({"density": [0.5, 1.5]}, "density of a breakpoint must lie"),
        ({"density": ((0.5, 0.0),)}, r"density of a breakpoint must lie in \(0, 1\]"),
        ({"layer_factors": []}, "at least one breakpoint"),
        ({"layer_factors": [1.0, -0.5]}, "factor of a breakpoint must be above 0"),
        ({"layer_factors": [1.0, 10**400]}, "factor of a breakpoint must be above 0 and finite"),
        ({"density": [0.5, 10**400]}, "density of a breakpoint must lie"),
        ({"layer_factors": ((0.5, 1.0), (0.2, 1.0))}, "fractions of factor breakpoints must rise"),
    ],
)
def test_schedule_refuses_bad_fields(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)


@pytest.mark.parametrize("field", ["density", "layer_factors"])
@pytest.mark.parametrize("value", [{0.0: 0.5}, {0.5, 0.2}, "0.5", 0.5])
def test_schedule_refuses_what_has_no_order(field: str, value: object) -> None:
    with pytest.raises(TypeError, match="expected a list of"):
        Schedule(**{field: value})
