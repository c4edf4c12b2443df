"""The price of a preset is that of the stored results it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svg_models.presets import PRESETS, preset_rows
from svg_models.recipe import Measured, Recipe

ROOT = Path(__file__).resolve().parents[1]
CASES = [
    pytest.param(row.recipe, one, id=f"{name}-{one.tokens}-{one.steps}")
    for name in PRESETS
    for row in preset_rows()[name]
    for one in row.recipe.measured
]


def stored_row(document: dict, recipe: Recipe, one: Measured) -> dict:
    """Return the row of `quality.py`'s results that has the settings of a recipe."""
    wanted = {
        k: v for k, v in recipe.method.to_dict().items() if k not in ("q_clusters", "k_clusters")
    }
    (size,) = (s for s in document["sizes"].values() if s["side"] == one.height)
    for row in size["rows"]:
        if all(wanted[k] == v for k, v in row["config"].items() if k in wanted):
            return row | {"noise_floor": size["noise_floor"]}
    raise AssertionError("no stored row has these settings")


@pytest.mark.parametrize(("recipe", "one"), CASES)
def test_the_price_of_a_preset_is_what_was_stored(recipe: Recipe, one: Measured) -> None:
    document = json.loads((ROOT / one.evidence).read_text())
    if "sizes" not in document:  # a recipe that `svg tune` wrote
        stored = Recipe.from_dict(document)
        assert stored.method == recipe.method
        assert stored.schedule == recipe.schedule
        (measured,) = stored.measured
        assert (measured.psnr, measured.work) == (one.psnr, one.work)
        return
    row = stored_row(document, recipe, one)
    assert (one.psnr, one.psnr_spread) == (row["psnr"]["mean"], row["psnr"]["std"])
    assert one.ssim == row["ssim"]["mean"]
    assert one.noise_floor == row["noise_floor"]["psnr"]["mean"]
    assert (one.steps, one.guidance) == (document["steps"], document["guidance"])
    assert one.prompts == len(document["prompts"])
    assert document["environment"]["device"] in one.machine
    schedule = document["schedule"]
    assert recipe.schedule.to_dict() == schedule
    dense = int(schedule["dense_steps"] * one.steps) / one.steps
    probes = 0.5 / 16 if row["config"]["route"] == "error" else 0.0
    work = dense + (1 - dense) * (row["realised_density"] + probes)
    assert one.work == pytest.approx(work, abs=1e-4)
