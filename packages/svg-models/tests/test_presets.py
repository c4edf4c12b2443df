"""Presets: what a name comes to, for which clip, and that its price stands beside it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import WanTransformer3DModel

from svg_attention import SVG2, Dense, Schedule
from svg_models import presets, recipe_for, sparsify
from svg_models.errors import SettingError
from svg_models.generation.request import CompareRequest, GenerateRequest
from svg_models.method_names import MethodSpec, read_method
from svg_models.presets import PRESETS, TABLE, find_row, preset_rows, read_table
from svg_models.recipes import choose_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 20


def wide(**config: Any) -> WanTransformer3DModel:
    """Return a transformer of the published 14B shape, without memory behind it."""
    with torch.device("meta"):
        return WanTransformer3DModel(num_layers=1, **config)


def narrow() -> WanTransformer3DModel:
    """Return one of the embedded model's width."""
    return wide(num_attention_heads=4, attention_head_dim=64)


def few(table: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a table whose `balanced` has a row for 8 steps or fewer."""
    table = copy.deepcopy(table)
    settings = {"density": 0.4, "compensate": True, "route": "error", "correct_bias": True}
    row = {
        "conditions": {"steps": [1, 8]},
        "method": "SVG2",
        "settings": settings,
        "schedule": {"dense_steps": 0.0, "dense_layers": 0.0},
    }
    table["presets"]["balanced"].insert(0, row | changes)
    return table


@pytest.fixture
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_came_to(name: str) -> None:
    for row in preset_rows()[name]:
        assert row.recipe.source == f"preset {name}"
        assert isinstance(row.recipe.method, SVG2)
        assert row.recipe.measured
        for one in row.recipe.measured:
            assert one.psnr is not None
            assert one.work is not None
            assert 0.0 < one.work < 1.0
            assert one.prompts >= 1
            assert one.evidence
            assert one.machine


def test_presets_trade_quality_for_work() -> None:
    rows = [find_row(name, steps=STEPS, tokens=3328) for name in PRESETS]
    measured = [row.recipe.measured[0] for row in rows if row is not None]
    psnr, work = [m.psnr for m in measured], [m.work for m in measured]
    assert psnr == sorted(psnr, reverse=True)
    assert work == sorted(work, reverse=True)
    conditions = {(m.model, m.tokens, m.steps, m.prompts) for m in measured}
    assert len(conditions) == 1, "only equal conditions can be compared"


@pytest.mark.parametrize("name", PRESETS)
def test_choose_recipe_fills_the_counts_for_the_clip(name: str) -> None:
    recipe = choose_recipe(read_method(None, preset=name), wide(), 75_600, num_steps=50)
    assert isinstance(recipe.method, SVG2)
    assert (recipe.method.q_clusters, recipe.method.k_clusters) == (300, 1000)
    row = find_row(name, steps=50, tokens=75_600, width=5120)
    assert row is not None
    assert recipe.schedule == row.recipe.schedule
    assert recipe.measured == row.recipe.measured
    short = choose_recipe(read_method(None, preset=name), narrow(), 3_328)
    assert isinstance(short.method, SVG2)
    assert (short.method.q_clusters, short.method.k_clusters) == (52, 208)


def test_choose_recipe_of_a_preset_stays_dense_where_sparsity_cannot_pay() -> None:
    spec = read_method(None, preset="fast")
    image = choose_recipe(spec, wide(), 75_600, latent_frames=1)
    assert isinstance(image.method, Dense)
    assert "a single frame is an image" in image.note
    for steps in (4, 50):
        short = choose_recipe(spec, wide(), 1_000, num_steps=steps)
        assert isinstance(short.method, Dense)
        assert "too short" in short.note


def test_choose_recipe_of_a_preset_stays_dense_where_the_table_has_no_row(
    monkeypatch: pytest.MonkeyPatch, table: dict[str, Any]
) -> None:
    table["presets"]["fast"] = table["presets"]["fast"][-1:]
    rows = read_table(table)
    monkeypatch.setattr(presets, "preset_rows", lambda: rows)
    recipe = choose_recipe(read_method(None, preset="fast"), wide(), 75_600, num_steps=4)
    assert isinstance(recipe.method, Dense)
    assert "no settings yet for 4 denoising steps" in recipe.note


# What the footage judge came to: dB with a share of all pairs, probes included.
@pytest.mark.parametrize(
    ("name", "steps", "work", "psnr"),
    [
        *((name, steps, 0.35, 42.6) for name in PRESETS for steps in (1, 4, 5)),
        *(("quality", steps, 0.35, 42.7) for steps in (6, 8)),
        *((name, steps, 0.25, 40.5) for name in ("balanced", "fast") for steps in (6, 8)),
    ],
)
def test_few_steps_of_a_large_model_are_sparse_where_a_preset_is_asked_for(
    name: str, steps: int, work: float, psnr: float
) -> None:
    spec = read_method(None, preset=name)
    recipe = choose_recipe(spec, wide(), 75_600, num_steps=steps)
    assert recipe.schedule == Schedule.sparse()
    (one,) = recipe.measured
    assert (one.model, one.steps) == ("footage judge", 4 if steps <= 5 else 8)
    assert one.work == pytest.approx(work, abs=2e-3)
    assert one.psnr == pytest.approx(psnr, abs=0.05)
    # Probes take the rest of the share.
    assert isinstance(recipe.method, SVG2)
    assert recipe.method == SVG2.corrected(
        recipe.method.density, count_probes=False, q_clusters=300, k_clusters=1000
    )
    assert work - 0.02 < recipe.method.density < work
    # The rows of narrow models are others, and stay theirs.
    row = find_row(name, steps=steps, tokens=3_328, width=512)
    assert row is not None
    assert row.automatic == 512


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (1, "1 denoising step is too few"),
        (4, "the preset balanced: 42.6 dB to dense with 35% of the attention (footage judge, 4 "),
        (8, "the preset balanced: 40.5 dB to dense with 25% of the attention (footage judge, 8 "),
    ],
)
def test_few_steps_of_a_large_model_stay_dense_and_name_the_preset_and_its_price(
    steps: int, words: str
) -> None:
    recipe = recipe_for(wide(), 75_600, num_steps=steps)
    assert isinstance(recipe.method, Dense)
    assert words in recipe.note
    assert recipe.note.endswith("steps, guidance 3)")
    assert "preset" not in recipe_for(wide(), 1_000, num_steps=steps).note, "dense there, too"


def test_a_preset_takes_a_curve_of_density_that_was_given() -> None:
    curve = Schedule.sparse([0.474] * 4 + [0.178] * 16)
    spec = read_method(None, preset="balanced")
    recipe = choose_recipe(spec, wide(), 75_600, schedule=curve, num_steps=20)
    assert recipe.schedule == curve
    assert isinstance(recipe.method, SVG2)
    assert recipe.method.count_probes is False, "the shares leave out what probes take"
    assert recipe.schedule.density_at(step=3, num_steps=20) == 0.474
    assert recipe.schedule.density_at(step=4, num_steps=20) == 0.178


def test_more_steps_of_a_large_model_keep_what_was_published() -> None:
    recipe = recipe_for(wide(), 75_600, num_steps=9)
    assert recipe.method == SVG2(
        q_clusters=300, k_clusters=1000, first_iterations=10, step_iterations=1
    )
    assert "Sparse-VideoGen" in recipe.source


def test_few_steps_are_sparse_where_the_table_has_a_row_measured_on_models_as_small(
    monkeypatch: pytest.MonkeyPatch, table: dict[str, Any]
) -> None:
    rows = read_table(few(table, automatic=512))
    monkeypatch.setattr(presets, "preset_rows", lambda: rows)
    sparse = recipe_for(narrow(), 3_328, num_steps=8)
    assert sparse.method == SVG2(
        q_clusters=52,
        k_clusters=208,
        density=0.4,
        compensate=True,
        route="error",
        correct_bias=True,
    )
    assert sparse.schedule == Schedule(dense_steps=0.0, dense_layers=0.0)
    assert sparse.source == "preset balanced"
    assert isinstance(recipe_for(wide(), 75_600, num_steps=8).method, Dense)
    assert isinstance(recipe_for(narrow(), 3_328, num_steps=8, latent_frames=1).method, Dense)
    # Who asks for the preset gets it on any model.
    asked = choose_recipe(read_method(None, preset="balanced"), wide(), 75_600, num_steps=8)
    assert isinstance(asked.method, SVG2)
    assert asked.method.density == 0.4


def test_few_steps_stay_dense_where_the_row_is_not_for_models_by_themselves(
    monkeypatch: pytest.MonkeyPatch, table: dict[str, Any]
) -> None:
    rows = read_table(few(table))
    monkeypatch.setattr(presets, "preset_rows", lambda: rows)
    assert isinstance(recipe_for(narrow(), 3_328, num_steps=8).method, Dense)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("presets", "fast", 0, "settings", "densty"), 0.2, "did you mean 'density'"),
        (("presets", "fast", 0, "conditions", "step"), [1, 2], "did you mean 'steps'"),
        (("presets", "fast", 0, "methods"), "SVG2", "did you mean 'method'"),
        (("presets", "faster"), [], "expected a table"),
        (("format",), "svg-presets/2", "expected a table"),
    ],
    ids=str,
)
def test_read_table_checks_every_name(
    path: tuple[Any, ...], value: Any, sentence: str, table: dict[str, Any]
) -> None:
    place: Any = table
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(SettingError, match=sentence):
        read_table(table)


def test_a_preset_is_named_as_one() -> None:
    spec = GenerateRequest(preset="fast").spec
    assert (spec.is_preset, spec.label, spec.slug, spec.words) == (
        True,
        "Preset fast",
        "fast",
        ["--preset", "fast"],
    )
    specs = CompareRequest(presets=["fast", "quality"], methods=["svg2-published"]).specs
    assert [s.slug for s in specs] == ["svg2-published", "fast", "quality"]
    with pytest.raises(SettingError, match="did you mean 'balanced'"):
        sparsify(tiny.pipeline(), preset="balanecd")


def test_svg2_published_is_what_was_published_at_any_size() -> None:
    spec = MethodSpec(name="svg2-published")
    for tokens, counts in ((75_600, (300, 1000)), (3_328, (52, 208))):
        recipe = choose_recipe(spec, wide(), tokens, num_steps=50)
        assert recipe.method == SVG2(q_clusters=counts[0], k_clusters=counts[1])
        assert "Sparse-VideoGen" in recipe.source
    # Asked for by name, it runs whatever the number of steps.
    assert isinstance(choose_recipe(spec, wide(), 75_600, num_steps=4).method, SVG2)
    mine = Schedule(dense_steps=0.5)
    assert choose_recipe(spec, wide(), 75_600, schedule=mine).schedule == mine


def test_sparsify_runs_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, preset="fast") as run:
        tiny.generate(pipe, num_inference_steps=10, num_frames=29)  # 1,152 tokens
    assert run.recipe is not None
    assert run.recipe.source == "preset fast"
    row = find_row("fast", steps=10, tokens=1152)
    assert row is not None
    assert isinstance(row.recipe.method, SVG2)
    assert isinstance(run.recipe.method, SVG2)
    assert run.recipe.method.density == row.recipe.method.density
    assert "embedded" in repr(run.recipe)


def test_the_table_is_beside_the_code_and_formatted() -> None:
    text = Path(TABLE).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"
