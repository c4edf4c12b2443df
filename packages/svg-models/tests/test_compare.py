"""Comparisons: what is compared is fair, and everything is in the numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from svg_models.comparison.result import Comparison
from svg_models.comparison.run import compare
from svg_models.errors import SettingError
from svg_models.generation.generate import generate
from svg_models.generation.request import DEFAULT_METHODS, CompareRequest
from svg_models.generation.settings import Settings
from svg_models.loading import Defaults, LoadedPipeline, load_pipeline
from svg_models.method_names import METHODS, WITHOUT_BUDGET, MethodSpec

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS: dict[str, Any] = {"steps": 5, "guidance": 2.0, "height": 48, "width": 48, "frames": 9}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedPipeline:
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.pipeline().save_pretrained(path)
    return load_pipeline(path, device="cpu")


@pytest.fixture(scope="module")
def comparison(loaded: LoadedPipeline) -> Comparison:
    methods = ["svg2", "svg2-error", "svg1", "random@0.6"]
    return compare("a red circle", methods=methods, density=0.4, model=loaded, seed=3, **SETTINGS)


def test_compare_the_dense_clip_is_that_of_an_untouched_pipeline(comparison: Comparison) -> None:
    pipe = tiny.pipeline()
    frames = tiny.generate(
        pipe,
        seed=3,
        prompt="a red circle",
        negative_prompt=None,
        num_inference_steps=5,
        guidance_scale=2.0,
        max_sequence_length=512,
        output_type="np",
    )
    expected = (np.asarray(frames[0]).clip(0, 1) * 255).round().astype(np.uint8)
    assert (comparison.dense.frames == expected).all()


def test_compare_every_method_keeps_its_budget(comparison: Comparison) -> None:
    by_name = {c.clip.method.slug: c for c in comparison.candidates}
    assert list(by_name) == ["svg2-40", "svg2-error-40", "svg1-40", "random-60"]
    for name in ("svg2-40", "svg2-error-40"):
        assert 0.25 < by_name[name].clip.stats.mean_density <= 0.4
    assert by_name["random-60"].clip.stats.mean_density > 0.4
    for candidate in comparison.candidates:
        assert len(candidate.similarity.psnr) == 9
        assert len(candidate.clip.paired_steps) == 4
        assert (candidate.speed is None) == bool(comparison.no_speed)
        assert len(candidate.clip.step_seconds) == 5
        assert sum(candidate.clip.step_seconds) == pytest.approx(candidate.clip.seconds)


def test_compare_methods_are_configured_as_they_are_named(comparison: Comparison) -> None:
    configs = {c.clip.method.name: c.clip.stats.recipe["settings"] for c in comparison.candidates}
    assert configs["svg2"]["compensate"] is False
    assert configs["svg2-error"] | {"compensate": True, "route": "error"} == configs["svg2-error"]
    assert configs["svg1"]["density"] == 0.4
    assert configs["random"]["density"] == 0.6


def test_save_writes_all_the_numbers_into_the_json(comparison: Comparison, tmp_path: Path) -> None:
    page = comparison.save(tmp_path / "out")
    text = (page.parent / "compare.json").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    numbers = json.loads(text)
    assert numbers["settings"]["seed"] == 3
    assert numbers["tokens"] == 432
    dense, svg2 = numbers["runs"][:2]
    assert dense["similarity"] is None
    assert len(svg2["similarity"]["psnr_db"]) == 9
    density, seconds = np.asarray(svg2["density"]), np.asarray(svg2["attention_seconds"])
    assert density.shape == seconds.shape == (5, 3)
    assert (density[0] == 1).all(), "the first of five steps stays dense"
    assert (density[1:] < 0.5).all()
    assert (seconds > 0).all()
    for run in numbers["runs"]:
        assert (page.parent / run["file"]).stat().st_size > 0


def test_generate_gives_the_same_clip_for_a_seed(loaded: LoadedPipeline) -> None:
    one, again = (
        generate("a red circle", model=loaded, method="svg2@0.4", seed=1, **SETTINGS)
        for _ in range(2)
    )
    assert (one.frames == again.frames).all()
    other = generate("a red circle", model=loaded, method="svg2@0.4", seed=2, **SETTINGS)
    assert (one.frames != other.frames).any()


def test_generate_reports_progress_by_steps(loaded: LoadedPipeline) -> None:
    seen: list[tuple[str, float, float]] = []
    generate(
        "a red circle",
        model=loaded,
        method="dense",
        progress=lambda stage, done, total: seen.append((stage, done, total)),
        **SETTINGS,
    )
    sampling = [(done, total) for stage, done, total in seen if stage == "sampling"]
    assert sampling == [(n, 5) for n in range(6)]
    assert [stage for stage, *_ in seen][-1] == "decoding"


def test_load_pipeline_reports_progress_to_the_end(tmp_path: Path) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "tiny")
    seen: list[tuple[float, float]] = []
    load_pipeline(tmp_path / "tiny", progress=lambda stage, done, total: seen.append((done, total)))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


def test_specs_by_default_share_one_budget() -> None:
    specs = CompareRequest().specs
    assert [spec.name for spec in specs] == list(DEFAULT_METHODS)
    assert len({spec.density for spec in specs}) == 1


def test_complete_takes_from_the_model_what_is_not_given() -> None:
    defaults = Defaults(prompt="a fox", steps=7, guidance=3.0)
    settings = Settings(steps=9, seed=4).complete(defaults, height=64)
    assert (settings.prompt, settings.steps, settings.guidance) == ("a fox", 9, 3.0)
    assert (settings.seed, settings.height, settings.width) == (4, 64, defaults.width)
    with pytest.raises(SettingError, match="steps must be 1 or more"):
        Settings(steps=0)


@pytest.mark.parametrize("name", METHODS)
def test_build_makes_a_method_of_every_name(name: str) -> None:
    from svg_attention import SVG2

    base = SVG2(q_clusters=7, k_clusters=9)
    method = MethodSpec.parse(name, density=None if name in WITHOUT_BUDGET else 0.3).build(base)
    if name == "svg2-published":
        assert method is base
    elif name.startswith("svg2"):
        assert (method.q_clusters, method.k_clusters, method.density) == (7, 9, 0.3)
        by_mass = MethodSpec.parse(name, top_p=0.8).build(base)
        assert (by_mass.top_p, by_mass.density) == (0.8, None)
    elif name not in WITHOUT_BUDGET:
        assert method.density == 0.3


def test_generate_auto_is_the_recipe_and_says_what_it_was(loaded: LoadedPipeline) -> None:
    few = generate("a red circle", model=loaded, **SETTINGS)
    assert few.method == MethodSpec(name="dense")
    assert few.stats.sparse_records == ()
    assert "432 tokens is too short" in few.stats.recipe["note"]
    asked = generate("a red circle", model=loaded, method="auto@0.5", **SETTINGS)
    assert asked.method == MethodSpec(name="svg2", density=0.5)
    assert 0.4 < asked.stats.mean_density <= 0.5
    with pytest.raises(SettingError, match="auto is for svg generate alone"):
        CompareRequest(methods=["auto"])


@pytest.mark.parametrize(
    "text", ["dense", "svg1@0.3", "svg2@0.2", "svg2-comp@0.2", "svg2-error@0.2", "random@0.4"]
)
def test_of_names_a_method(text: str) -> None:
    from svg_attention import SVG2

    spec = MethodSpec.parse(text)
    method = spec.build(SVG2())
    assert MethodSpec.of(method) == dataclasses.replace(spec, method=method)
    assert MethodSpec.of(SVG2(top_p=0.8)).top_p == 0.8
