"""Fits: densities that go with what steps and layers were measured to cost."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny

from svg_attention import Schedule
from svg_models import tune
from svg_models.loading import load_pipeline
from svg_models.tuning import run as tuning_run
from svg_models.tuning.fit import FITTED, Fit, fit, is_only, only, schedule_of_only
from svg_models.tuning.journal import Trial, key_of
from svg_models.tuning.page import tune_page
from svg_models.tuning.space import START

STEPS, LAYERS, SLOPE = 20, 30, 2.5
# A model whose error adds up over calls, most of it in the first steps and the last layers.
STEP_COST = [4.0 if step < 4 else 1.0 for step in range(STEPS)]
LAYER_COST = [1.0 + 2.0 * (layer >= 20) for layer in range(LAYERS)]


def error(schedule: Schedule) -> float:
    total = 0.0
    for step, layer in itertools.product(range(STEPS), range(LAYERS)):
        place = {"step": step, "num_steps": STEPS, "layer": layer, "num_layers": LAYERS}
        if schedule.is_dense(**place):
            continue
        density = schedule.density_at(**place, own=0.2)
        assert density is not None
        total += STEP_COST[step] * LAYER_COST[layer] * density**-SLOPE
    return 1e-8 * total


def mean_density(schedule: Schedule) -> float:
    places = itertools.product(range(STEPS), range(LAYERS))
    found = [
        schedule.density_at(step=step, num_steps=STEPS, layer=layer, num_layers=LAYERS)
        for step, layer in places
    ]
    return sum(x or 0.0 for x in found) / len(found)


def flat(density: float) -> Schedule:
    return Schedule.sparse([density])


def measured() -> Fit:
    def psnr(name: str, density: float) -> float:
        schedule = schedule_of_only(name, density) if name else flat(density)
        return -10.0 * math.log10(error(schedule))

    return fit(psnr, density=0.2, scouts=(0.1, 0.2, 0.4), steps=STEPS, layers=LAYERS)


def test_fit_finds_the_shares_and_the_slope_of_a_model_whose_error_adds_up() -> None:
    found = measured()
    assert found.slope == pytest.approx(SLOPE)
    assert found.steps == pytest.approx([cost / sum(STEP_COST) for cost in STEP_COST])
    # Layers are measured in eight groups, one of which straddles the border.
    assert sum(found.layers) == pytest.approx(1.0)
    assert found.layers[0] == pytest.approx(1.0 / sum(LAYER_COST))
    assert found.layers[-1] == pytest.approx(3.0 / sum(LAYER_COST))


def test_fitted_schedules_keep_the_mean_and_have_less_error() -> None:
    found = measured()
    errors = {}
    for name in FITTED:
        schedule = found.schedule(name, 0.2)
        assert mean_density(schedule) == pytest.approx(0.2, rel=1e-6)
        errors[name] = error(schedule)
    assert errors["fitted to the steps"] < 0.9 * error(flat(0.2))
    assert errors["fitted to steps and layers"] < errors["fitted to the steps"]
    assert errors["fitted steeply to the steps"] > errors["fitted to the steps"]


def test_fitted_schedules_have_no_density_above_1_and_keep_the_mean() -> None:
    steep = Fit(steps=(0.7, 0.1, 0.1, 0.1), layers=(1.0,), slope=0.5)
    schedule = steep.schedule("fitted steeply to the steps", 0.6)
    densities = [schedule.density_at(step=step, num_steps=4) for step in range(4)]
    assert densities[0] == 1.0
    assert sum(x or 0.0 for x in densities) / 4 == pytest.approx(0.6)
    whole = steep.schedule("fitted to the steps", 1.0)
    assert [whole.density_at(step=step, num_steps=4) for step in range(4)] == [1.0] * 4


def test_fitted_schedules_keep_one_density_where_steps_read_alike() -> None:
    found = Fit(steps=(0.4, 0.3, 0.1, 0.1, 0.1), layers=(1.0,), slope=1.0)
    point = START.replace(schedule="fitted to the steps", alike="two steps")
    schedule = point.recipe(tuning_run.Layers(), found).schedule
    densities = [schedule.density_at(step=step, num_steps=5) for step in range(5)]
    assert densities[0] == densities[1] > densities[2] == densities[3] == densities[4]
    assert sum(x or 0.0 for x in densities) / 5 == pytest.approx(point.density)


def test_fit_of_parts_that_cost_nothing_gives_them_a_little() -> None:
    def psnr(name: str, density: float) -> float | None:
        return 30.0 if name in ("", "steps 0 to 1 of 4", "layers 0 to 1 of 2") else None

    found = fit(psnr, density=0.2, scouts=(0.1, 0.4), steps=4, layers=2)
    assert min(found.steps) > 0.0
    assert sum(found.steps) == pytest.approx(1.0)
    assert found.steps[0] == max(found.steps)
    assert fit(lambda *_: None, density=0.2, scouts=(0.1, 0.4), steps=2, layers=2).steps == (
        0.5,
        0.5,
    )


def test_only_names_what_alone_is_sparse() -> None:
    name = only("layers", 1, 3, 4)
    assert is_only(name)
    schedule = schedule_of_only(name, 0.3)
    dense = [schedule.is_dense(step=0, num_steps=2, layer=x, num_layers=4) for x in range(4)]
    assert dense == [True, False, False, True]
    schedule = schedule_of_only(only("steps", 0, 1, 3), 0.3)
    dense = [schedule.is_dense(step=x, num_steps=3, layer=0, num_layers=4) for x in range(3)]
    assert dense == [False, True, True]
    for wrong in ("", "steps", "steps 2 to 2 of 4", "steps 0 to 5 of 4", "heads 0 to 1 of 4"):
        assert not is_only(wrong)


def test_trial_of_a_fit_is_read_back_and_a_wrong_one_refused() -> None:
    point = START.replace(only=only("steps", 0, 2, 8))
    trial = Trial(point=point, prompt=0, psnr=40.0, ssim=1.0, flip=0.0, flicker=0.0, work=0.9)
    assert Trial.from_dict(trial.to_dict()) == trial
    assert "only steps 0 to 2 of 8 sparse" in str(point)
    assert "only" not in START.to_dict()  # as in journals that know of no fit
    values = trial.to_dict()
    values["point"]["only"] = "steps of somebody"
    with pytest.raises(ValueError, match="unknown steps or layers"):
        Trial.from_dict(values)
    with pytest.raises(ValueError, match="needs a fit"):
        START.replace(schedule="fitted to the steps").recipe(tuning_run.Layers())


def test_tune_with_a_fit_tries_what_it_found_and_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    axes = {"corrections": ("compensation",), "schedule": ("flat",)}
    monkeypatch.setattr(tuning_run, "axes_for", lambda steps, cached, guided: axes)
    kept: dict[Any, Any] = {}

    def key(conditions: Any, point: Any) -> str:
        kept[point] = conditions
        return key_of(conditions, point)

    monkeypatch.setattr(tuning_run, "key_of", key)
    path = tmp_path / "tiny"
    tiny.pipeline().save_pretrained(path)
    loaded = load_pipeline(str(path), device="cpu")
    clip: dict[str, Any] = {"steps": 2, "guidance": 1.0, "height": 32, "width": 48, "frames": 9}
    tuned = tune(
        psnr=30, model=loaded, prompts=["a red circle"], time_by="density", fit=True, **clip
    )
    assert tuned.fit is not None
    assert len(tuned.fit.steps) == 2
    tried = {trial.point for trial in tuned.trials if trial.point is not None}
    alone = {only(of, i, i + 1, n) for of, n in (("steps", 2), ("layers", 3)) for i in range(n)}
    assert {point.only for point in tried} == {"", *alone}
    assert {point.schedule for point in tried} == {"flat", *FITTED}
    # A fit is to the first prompt, so another one must not find these trials in the journal.
    fits = {p: kept[p].get("fit") for p in tried}
    assert all(fits[p] == (asdict(tuned.fit) if p.schedule in FITTED else None) for p in tried)
    assert not any(point.only for point in tuned.means())
    page = tune_page(tuned)
    assert "more where a step was measured to cost more" in page
    assert "--time-by density --fit --model" in page
    assert tuned.to_dict()["fit"]["slope"] == tuned.fit.slope
