"""The price of a preset is that of the stored results it names, and the page shows it."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import preset_table
import pytest
from preset_table import SCHEDULES, markdown, one_row, put, row_of_cases, row_of_recipe

from svg_attention import SVG2, Schedule
from svg_models.presets import PRESETS, TABLE, preset_rows, read_table
from svg_models.recipe import Measured, Recipe

ROOT = Path(__file__).resolve().parents[1]
CASES = [
    pytest.param(row.recipe, one, id=f"{name}-{one.model}-{one.tokens}-{one.steps}")
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
        sizes = {name: tuple(clip.values()) for name, clip in document["clips"].items()}
        for row in document["cases"].values():
            alike = sizes[row["size"]] == (one.height, one.width, one.tokens)
            alike = alike and row["steps"] == one.steps
            schedule = SCHEDULES.get(row["schedule"]) == recipe.schedule
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
    assert one.model.removesuffix(" judge") == document.get("judge", "embedded")
    assert (one.frames, one.guidance) == (document["frames"], document["guidance"])
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
        "clips": {
            "default": {"height": 128, "width": 128, "tokens": 3328},
            "large": {"height": 256, "width": 256, "tokens": 13312},
        },
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


def of_another_judge(density: float) -> dict[str, Any]:
    """Return made-up results of the footage judge."""
    found = document()
    case = found["cases"]["one"]
    config = {**case["config"], "density": density, "q_clusters": 99}
    return {
        **found,
        "judge": "footage",
        "guidance": 3.0,
        "frames": 45,
        "clips": {"footage": {"height": 192, "width": 336, "tokens": 12096}},
        "noise_floor": {},
        "cases": {"one": case | {"size": "footage", "config": config}},
    }


def test_one_row_has_the_measurements_of_several_judges(table: dict[str, Any]) -> None:
    asked = ("no dense step", 0.25, "error, bias, repair", 8)
    row = one_row(
        [
            row_of_cases(document(), *asked, "x.json"),
            row_of_cases(of_another_judge(0.219), *asked, "y.json"),
        ]
    )
    changed = put(table, "fast", {"conditions": {"steps": [5, 6]}} | row)
    rows = read_table(changed)["fast"]
    (recipe,) = (row.recipe for row in rows if row.conditions == {"steps": (5.0, 6.0)})
    *embedded, footage = recipe.measured
    assert [(m.model, m.height, m.width, m.tokens) for m in embedded] == [
        ("embedded", 128, 128, 3328),
        ("embedded", 256, 256, 13312),
    ]
    assert (footage.model, footage.frames, footage.guidance) == ("footage judge", 45, 3.0)
    assert (footage.height, footage.width, footage.tokens) == (192, 336, 12096)
    assert footage.evidence == "y.json"
    assert "footage judge, 45 x 336 x 192, 8 steps, 16 prompts, H, bfloat16" in markdown(changed)


def test_one_row_refuses_measurements_of_other_settings() -> None:
    asked = ("no dense step", 0.25, "error, bias, repair", 8)
    rows = [
        row_of_cases(document(), *asked, "x.json"),
        row_of_cases(of_another_judge(0.237), *asked, "y.json"),
    ]
    with pytest.raises(SystemExit, match="measured with other density: give each its own row"):
        one_row(rows)
    with pytest.raises(SystemExit, match="measured with other schedule"):
        one_row([rows[0], {**rows[0], "schedule": {"dense_steps": 0.3}}])


def test_row_of_cases_refuses_sizes_whose_sparse_calls_had_other_densities() -> None:
    found = document()
    two = found["cases"]["two"]
    found["cases"]["two"] = two | {"config": {**two["config"], "density": 0.237}}
    asked = ("no dense step", 0.25, "error, bias, repair", 8)
    with pytest.raises(SystemExit, match="other density"):
        row_of_cases(found, *asked, "x.json")
    assert row_of_cases(found, *asked, "x.json", "large")["settings"]["density"] == 0.237


def test_every_row_for_models_of_any_width_was_measured_on_the_footage_judge() -> None:
    rows = [row for name in PRESETS for row in preset_rows()[name] if "width" not in row.conditions]
    assert len(rows) == 3 * 3
    for row in rows:
        assert row.automatic == 0
        assert "footage judge" in [one.model for one in row.recipe.measured]


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot read"),
        ("# a page", "cannot read"),
        ("[]", "neither cases of quality"),
        ('{"cases": {}}', "outside of the repository"),
    ],
)
def test_row_of_refuses_what_is_no_stored_result(
    text: str | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "quality.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=said):
        preset_table._row_of(path, argparse.Namespace(case=None))


def test_row_of_asks_which_case() -> None:
    path = preset_table.ROOT / "benchmarks" / "results" / "h100" / "quality.json"
    with pytest.raises(SystemExit, match="--case SCHEDULE DENSITY METHOD"):
        preset_table._row_of(path, argparse.Namespace(case=None))
