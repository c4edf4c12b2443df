"""The price of a preset is that of the stored results it names, and the page shows it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import preset_table
import pytest
from preset_table import SCHEDULES, SIDES, markdown, put, row_of_cases, row_of_recipe

from svg_attention import SVG2, Schedule
from svg_models.presets import PRESETS, TABLE, preset_rows, read_table
from svg_models.recipe import Measured, Recipe

ROOT = Path(__file__).resolve().parents[1]
CASES = [
    pytest.param(row.recipe, one, id=f"{name}-{one.tokens}-{one.steps}")
    for name in PRESETS
    for row in preset_rows()[name]
    for one in row.recipe.measured
]


@pytest.fixture
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def same_settings(recipe: Recipe, config: dict[str, Any]) -> bool:
    """Return whether stored settings are those of a recipe, as far as both say them."""
    wanted = recipe.method.to_dict()
    # Results keep the settings that there were when they were measured.
    for name, value in {**type(recipe.method)().to_dict(), **config}.items():
        if name not in wanted or name in ("q_clusters", "k_clusters"):
            continue
        if name == "density" and wanted[name] != pytest.approx(value, abs=1e-3):
            return False
        if name not in ("density", "first_iterations") and wanted[name] != value:
            return False
    return True


def stored_row(document: dict[str, Any], recipe: Recipe, one: Measured) -> dict[str, Any]:
    """Return what results of `quality.py` say of a recipe: by case, or as they were before."""
    if "cases" in document:
        for row in document["cases"].values():
            alike = SIDES[row["size"]] == one.height and row["steps"] == one.steps
            schedule = SCHEDULES[row["schedule"]] == recipe.schedule
            if alike and schedule and same_settings(recipe, row["config"]):
                return row | {"total": row["total_density"]}
        raise AssertionError("no stored case has these settings")
    assert recipe.schedule.to_dict() == document["schedule"]
    assert one.steps == document["steps"]
    (size,) = (s for s in document["sizes"].values() if s["side"] == one.height)
    dense = int(recipe.schedule.dense_steps * one.steps) / one.steps
    for row in size["rows"]:
        if same_settings(recipe, row["config"]):
            probes = 0.5 / 16 if row["config"]["route"] == "error" else 0.0
            return row | {"total": dense + (1 - dense) * (row["realised_density"] + probes)}
    raise AssertionError("no stored row has these settings")


@pytest.mark.parametrize(("recipe", "one"), CASES)
def test_the_price_of_a_preset_is_what_was_stored(recipe: Recipe, one: Measured) -> None:
    document = json.loads((ROOT / one.evidence).read_text())
    if "method" in document:  # a recipe that `svg tune` wrote
        stored = Recipe.from_dict(document)
        assert (stored.method, stored.schedule) == (recipe.method, recipe.schedule)
        (measured,) = stored.measured
        assert (measured.psnr, measured.work) == (one.psnr, one.work)
        assert (measured.steps, measured.prompts) == (one.steps, one.prompts)
        return
    row = stored_row(document, recipe, one)
    assert (one.psnr, one.psnr_spread) == (row["psnr"]["mean"], row["psnr"]["std"])
    assert one.ssim == row["ssim"]["mean"]
    assert one.guidance == document["guidance"]
    assert one.prompts == len(document["prompts"])
    assert row.get("device", document["environment"]["device"]) in one.machine
    assert one.work == pytest.approx(row["total"], abs=1e-4)


def test_the_page_shows_the_table(table: dict[str, Any]) -> None:
    assert markdown(table) in preset_table.PAGE.read_text(encoding="utf-8")


def document() -> dict[str, Any]:
    """Return results as `quality.py` stores them, made up."""
    summary = {"mean": 36.5, "std": 2.0, "min": 33.0, "max": 40.0}
    method = SVG2(
        q_clusters=52, k_clusters=208, density=0.219, compensate=True, route="error",
        correct_bias=True, repair_rows=64, first_iterations=10,
    )  # fmt: skip
    case = {
        "size": "default", "steps": 8, "schedule": "no dense step", "density": 0.25,
        "method": "error, bias, repair", "total_density": 0.2493, "config": method.to_dict(),
        "psnr": summary, "ssim": summary, "flicker": summary,
    }  # fmt: skip
    return {
        "environment": {"device": "H", "dtype": "bfloat16", "torch": "2", "diffusers": "0.42"},
        "guidance": 4.0,
        "frames": 49,
        "prompts": ["a"] * 16,
        "noise_floor": {"default clip, 8 steps": {"psnr": summary}},
        "cases": {"one": case, "two": case | {"size": "large"}},
    }


def test_put_makes_stored_cases_the_row_of_a_preset(table: dict[str, Any]) -> None:
    row = row_of_cases(document(), "no dense step", 0.25, "error, bias, repair", 8, "x.json")
    before = copy.deepcopy(table)
    changed = put(table, "fast", {"conditions": {"steps": [5, 6]}, "automatic": 512} | row)
    assert table == before
    rows = read_table(changed)["fast"]
    (recipe,) = (row.recipe for row in rows if row.conditions == {"steps": (5.0, 6.0)})
    assert recipe.schedule == Schedule(dense_steps=0.0, dense_layers=0.0)
    assert isinstance(recipe.method, SVG2)
    assert (recipe.method.density, recipe.method.q_clusters) == (0.219, None)
    assert [m.tokens for m in recipe.measured] == [3328, 13312]
    assert {(m.psnr, m.work, m.prompts) for m in recipe.measured} == {(36.5, 0.2493, 16)}
    assert [m.noise_floor for m in recipe.measured] == [36.5, None]
    again = put(changed, "fast", {"conditions": {"steps": [5, 6]}} | row)
    assert len(again["presets"]["fast"]) == len(rows) == len(before["presets"]["fast"]) + 1
    assert "| `fast` | 5 to 6 | density 0.219, routed by error, bias, repair, no step dense |" in (
        markdown(changed)
    )


def test_put_takes_a_recipe_of_a_search(table: dict[str, Any]) -> None:
    one = preset_rows()["fast"][0].recipe
    row = row_of_recipe(one.to_dict(), "benchmarks/results/tuned.json")
    changed = put(table, "quality", {"conditions": {"steps": [1, 7]}} | row)
    rows = read_table(changed)["quality"]
    (found,) = (row.recipe for row in rows if row.conditions == {"steps": (1.0, 7.0)})
    assert (found.method, found.schedule) == (one.method, one.schedule)
    assert found.measured[0].evidence == "benchmarks/results/tuned.json"


def test_row_of_cases_names_what_was_not_stored() -> None:
    with pytest.raises(SystemExit, match=r"no case 'no dense step', 0\.3, "):
        row_of_cases(document(), "no dense step", 0.3, "error, bias, repair", 8, "x.json")
