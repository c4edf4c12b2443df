"""Recipe files: what was written is read and runs, and nothing else does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

from svg_attention import SVG1, SVG2, Dense, Method, RandomBlocks, Schedule
from svg_models import compare, generate, sparsify
from svg_models.cli import app
from svg_models.errors import SettingError
from svg_models.generation.request import CompareRequest
from svg_models.recipe import FORMAT, Layers, Measured, Recipe, read_document

pytestmark = pytest.mark.usefixtures("one_thread")

MEASURED = Measured(
    model="embedded",
    frames=49,
    height=128,
    width=128,
    tokens=3328,
    steps=20,
    guidance=4.0,
    prompts=3,
    psnr=33.5,
    psnr_spread=2.0,
    work=0.25,
    seconds=4.0,
    dense_seconds=10.0,
    machine="somebody's GPU, bfloat16",
    versions={"torch": "2.13"},
)
SMALL = SVG2(q_clusters=4, k_clusters=8, density=0.5, compensate=True, first_iterations=2)
RECIPE = Recipe(
    method=SMALL,
    schedule=Schedule(dense_steps=0.5, dense_layers=0.0),
    schedules={"transformer_2": Schedule(density=((0.0, 0.5), (1.0, 0.2)))},
    layers=Layers(fuse=False, exact_dense=True),
    source="svg tune",
    note="a note",
    measured=(MEASURED,),
)
MINIMAL: dict[str, Any] = {"method": "SVG2"}


@pytest.mark.parametrize(
    "method", [SMALL, SVG2(), SVG1(density=0.4), Dense(), RandomBlocks()], ids=repr
)
def test_save_writes_what_read_reads(method: Method, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, method=method)
    path = recipe.save(tmp_path / "recipe.json")
    assert Recipe.read(path) == recipe
    document = json.loads(path.read_text(encoding="utf-8"))
    assert (document["format"], document["method"]) == (FORMAT, type(method).__name__)
    assert "name" not in document["settings"]
    assert document["measured"][0]["versions"] == {"torch": "2.13"}


def test_from_dict_fills_what_is_missing() -> None:
    recipe = Recipe.from_dict(MINIMAL)
    assert recipe == Recipe(method=SVG2(), schedule=Schedule())
    assert recipe.layers == Layers(fuse=True, linears="bf16")


@pytest.mark.parametrize(("num_steps", "last"), [(1, 1), (4, 1), (10, 1), (11, 2), (50, 2)])
def test_in_fp8_leaves_out_the_last_steps(num_steps: int, last: int) -> None:
    layers = Layers(linears="fp8")
    every = range(num_steps)
    inside = [layers.in_fp8(sparse=True, step=step, num_steps=num_steps) for step in every]
    assert inside == [True] * (num_steps - last) + [False] * last
    assert not any(layers.in_fp8(sparse=False, step=step, num_steps=num_steps) for step in every)
    whole = Layers(linears="fp8", fp8_from="start")
    for sparse in (False, True):
        assert all(whole.in_fp8(sparse=sparse, step=step, num_steps=num_steps) for step in every)
    # Nobody knows which step is the last.
    assert layers.in_fp8(sparse=True, step=num_steps - 1, num_steps=None)


def test_measured_says_the_conditions() -> None:
    assert MEASURED.speedup == 2.5
    for words in ("33.5 dB ± 2.0", "25% of the attention", "2.50x", "3 prompts", "20 steps"):
        assert words in str(MEASURED)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methd": "SVG2"}, "no setting 'methd'; did you mean 'method'"),
        ({"method": "SVG3"}, "unknown method 'SVG3'; did you mean 'SVG2'?"),
        ({"method": 3}, "names its method"),
        ({"settings": {"densty": 0.2}}, "no setting 'densty'; did you mean 'density'"),
        ({"settings": {"density": "0.2"}}, "density must be a number, got '0.2'"),
        ({"settings": {"density": True}}, "density must be a number, got True"),
        ({"settings": {"density": 2}}, "density must lie in"),
        ({"settings": {"q_clusters": 2.0}}, "q_clusters must be an integer, got 2.0"),
        ({"settings": {"first_iterations": 10**9}}, "first_iterations must be at most 10,000"),
        ({"settings": {"correct_bias": True}}, "set route='error'"),
        ({"settings": []}, "settings must be an object, got []"),
        ({"schedule": {"layer_factors": [1, 2]}}, "layer_factors multiply a density, and SVG2 was"),
        ({"schedule": {"dense_step": 0.2}}, "did you mean 'dense_steps'"),
        ({"schedule": {"density": [[0.5, 0.2], [0.2, 0.5]]}}, "must rise"),
        ({"schedule": 0.3}, "schedule must be an object, got 0.3"),
        ({"schedules": {"transformer_3": {}}}, "did you mean 'transformer_2'"),
        ({"schedules": {"transformer_2": 1}}, "transformer_2 must be an object"),
        ({"linears": "fp4"}, "linears must be one of bf16, fp8, got 'fp4'; did you mean 'fp8'"),
        ({"fuse": "yes"}, "fuse must be True or False, got 'yes'"),
        ({"note": 3}, "note must be a text"),
        ({"note": "x" * 10_000}, "note must be a text of at most 2,000"),
        ({"measured": {}}, "measured must be a list"),
        ({"measured": [{"model": "x"}]}, "a measurement says its frames"),
        ({"measured": ["x"]}, "each measurement is an object"),
        ({"measured": [{"psnrr": 3}]}, "did you mean 'psnr'"),
        ({"format": "svg-recipe/2"}, "a newer svg-models wrote it"),
        ({"format": "svg-compare/1"}, "the format must be svg-recipe/1"),
        ({"format": 3}, "the format must be"),
    ],
    ids=str,
)
def test_from_dict_refuses_with_the_nearest_and_the_file(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**MINIMAL, **changes}), encoding="utf-8")
    with pytest.raises(SettingError) as refused:
        Recipe.read(path)
    assert sentence in str(refused.value)
    assert str(refused.value).startswith("mine.json")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "the file is empty"),
        ("{", "as a recipe"),
        ("[]", "a recipe is a JSON object"),
        ('"SVG2"', "a recipe is a JSON object"),
        ('{"method": "SVG2", "method": "SVG1"}', "'method' stands there twice"),
        ('{"method": "SVG2", "settings": {"density": NaN}}', "NaN is no JSON"),
        ('{"method": "SVG2", "settings": {"q_clusters": ' + "9" * 6000 + "}}", "as a recipe"),
        ("[" * 100_000, "as a recipe"),
        (" " * (1 << 20) + "{}", "more than a megabyte"),
        ("\x00\x01", "as a recipe"),
        ("!!python/object/apply:os.system ['true']", "as a recipe"),
    ],
    ids=range(11),
)
def test_read_refuses_hostile_files_in_a_sentence(
    content: str, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SettingError, match=sentence.replace("(", r"\(")) as refused:
        read_document(path)
    assert len(str(refused.value)) < 700


def test_read_refuses_what_is_not_utf8_and_what_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_bytes(b"\xff\xfe{}")
    for bad in (path, tmp_path, "/dev/zero", tmp_path / "missing"):
        with pytest.raises(SettingError, match="as a recipe"):
            Recipe.read(bad)


def test_save_refuses_a_method_that_no_file_can_name(tmp_path: Path) -> None:
    class Mine(SVG1):
        pass

    recipe = Recipe(method=Mine(), schedule=Schedule())
    with pytest.raises(SettingError, match="unknown method 'Mine'"):
        recipe.save(tmp_path / "mine.json")
    assert list(tmp_path.iterdir()) == []


def test_sparsify_runs_a_recipe_as_it_is_and_writes_what_ran(tmp_path: Path) -> None:
    path = RECIPE.save(tmp_path / "one.json")
    pipe = tiny.pipeline()
    with sparsify(pipe, SMALL, RECIPE.schedule, fuse=False, exact_dense=True):
        expected = tiny.generate(pipe)
    with sparsify(pipe, recipe=path) as run:
        video = tiny.generate(pipe)
    assert torch.equal(video, expected)
    assert run.recipe == RECIPE
    again = Recipe.read(run.recipe.save(tmp_path / "two.json"))
    with sparsify(pipe, recipe=again):
        assert torch.equal(tiny.generate(pipe), expected)
    assert {r.step for r in run.stats().sparse_records} == {2, 3}
    assert Recipe.from_dict(run.stats().recipe) == RECIPE


def test_sparsify_what_is_given_comes_before_the_recipe() -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, recipe=RECIPE, schedule=Schedule(dense_steps=0.75), fuse=True) as run:
        tiny.generate(pipe)
    assert run.recipe is not None
    assert run.recipe.schedules == {}
    assert run.recipe.layers == Layers(exact_dense=True)
    assert {r.step for r in run.stats().sparse_records} == {3}


def test_sparsify_gives_each_transformer_its_schedule() -> None:
    pipe = tiny.pipeline(tiny.transformer(), tiny.transformer(seed=4), boundary_ratio=0.8)
    recipe = Recipe(
        method=SMALL,
        schedule=Schedule(dense_steps=0.0, dense_layers=0.0),
        schedules={"transformer_2": Schedule(dense_steps=0.75, dense_layers=0.0)},
    )
    with sparsify(pipe, recipe=recipe) as run:
        tiny.generate(pipe, num_inference_steps=8)
    found = {(r.transformer, r.step): r.method for r in run.stats().records}
    assert {name for name, _ in found} == {"transformer", "transformer_2"}
    for (name, step), method in found.items():
        assert method == ("Dense" if name == "transformer_2" and step < 6 else "SVG2"), (name, step)


@pytest.mark.parametrize("given", [{"method": "svg2"}, {"density": 0.2}, {"top_p": 0.9}], ids=str)
def test_a_recipe_is_not_given_beside_a_method(given: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"leave {next(iter(given))} out"):
        sparsify(tiny.pipeline(), recipe=RECIPE, **given)
    with pytest.raises(SettingError, match=f"leave {next(iter(given))} out"):
        generate("x", recipe=RECIPE, **given)


def test_a_recipe_is_a_file_or_a_recipe() -> None:
    with pytest.raises(SettingError, match="recipe must be a file or a Recipe, got a int"):
        generate("x", recipe=3)
    with pytest.raises(SettingError, match="recipes must be a list"):
        compare("x", recipes="one.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.pipeline().save_pretrained(path)
    return str(path)


TINY = ["--size", "48x48", "--frames", "9", "--steps", "4", "--guidance", "2"]


def test_generate_takes_a_recipe_and_writes_one(folder: str, tmp_path: Path) -> None:
    mine, ran = tmp_path / "mine.json", tmp_path / "ran.json"
    RECIPE.save(mine)
    clips = [tmp_path / "one.mp4", tmp_path / "two.mp4"]
    words = ["generate", "a red circle", "-m", folder, *TINY, "--json", "-o"]
    first = CliRunner().invoke(
        app, [*words, str(clips[0]), "--recipe", str(mine), "--save-recipe", str(ran)]
    )
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["method"] == "Recipe mine"
    assert Recipe.read(ran) == RECIPE
    second = CliRunner().invoke(app, [*words, str(clips[1]), "--recipe", str(ran)])
    assert second.exit_code == 0, second.output
    assert clips[0].read_bytes() == clips[1].read_bytes()


def test_a_batch_makes_a_clip_again_whose_recipe_has_changed(folder: str, tmp_path: Path) -> None:
    mine, lines = tmp_path / "mine.json", tmp_path / "prompts.txt"
    lines.write_text("a red circle\n", encoding="utf-8")
    words = ["batch", str(lines), "-m", folder, *TINY, "--json", "-o", str(tmp_path / "out")]
    made = []
    for recipe in (RECIPE, RECIPE, dataclasses.replace(RECIPE, method=SVG1(density=0.5))):
        recipe.save(mine)
        result = CliRunner().invoke(app, [*words, "--recipe", str(mine)])
        assert result.exit_code == 0, result.output
        made.append(json.loads(result.stdout)[0]["made"])
    assert made == [True, False, True]


def test_compare_takes_recipes_beside_methods(folder: str, tmp_path: Path) -> None:
    RECIPE.save(tmp_path / "My recipe!.json")
    words = ["compare", "a red circle", "-m", folder, *TINY, "--json", "-o", str(tmp_path / "out")]
    recipe = ["--recipe", str(tmp_path / "My recipe!.json")]
    result = CliRunner().invoke(app, [*words, "--method", "random@0.5", *recipe])
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout)["runs"]
    assert [run["name"] for run in runs] == ["dense", "random-50", "recipe-my-recipe"]
    assert Recipe.from_dict(runs[-1]["config"]) == RECIPE
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "--recipe" in page
    alone = CompareRequest(recipes=[recipe[1]]).specs
    assert [spec.slug for spec in alone] == ["recipe-my-recipe"]


def test_of_recipe_two_of_one_name_have_files_of_their_own(tmp_path: Path) -> None:
    paths = []
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        paths.append(
            Recipe(method=SVG2(density=0.2 if part == "a" else 0.4), schedule=Schedule()).save(
                tmp_path / part / "x.json"
            )
        )
    slugs = [spec.slug for spec in CompareRequest(recipes=paths).specs]
    assert slugs == ["recipe-x", "recipe-x-n2"]
