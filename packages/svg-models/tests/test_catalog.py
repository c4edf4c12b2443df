"""What is known of models, and how `svg models` tells it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import typing

import diffusers
import pytest
from click.testing import Result
from typer.testing import CliRunner

from svg_models.catalog import catalog, describe, find_family
from svg_models.cli import app
from svg_models.errors import SettingError
from svg_models.families import SKIPPED, known_families
from svg_models.model_names import PIPELINES, check_model_name


def models(monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    monkeypatch.setenv("COLUMNS", "160")
    return CliRunner().invoke(app, ["models", *words])


@pytest.mark.parametrize("family", known_families(), ids=lambda family: family.name)
def test_catalog_the_pipelines_of_a_family_run_its_transformers(family: typing.Any) -> None:
    names = PIPELINES[family.name]
    assert bool(names) == (family.name != "consisid")
    for name in names:
        kind = getattr(diffusers, name)
        hint = inspect.signature(kind.__init__).parameters["transformer"].annotation
        assert any(transformer in str(hint) for transformer in family.transformers), name


def test_catalog_everything_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    output = models(monkeypatch).stdout
    assert "embedded" in output
    for family in known_families():
        assert f"{family.name}  {family.title}" in output
        for text in (*family.checkpoints, *(row.title for row in family.recipes)):
            assert text in output
        for row in family.recipes:
            assert f"{row.q_clusters} x {row.k_clusters}" in output
            assert row.source.split(";")[0] in output


def test_find_family_takes_its_name_or_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = models(monkeypatch, "cosmos").stdout
    assert models(monkeypatch, "nvidia/Cosmos-1.0-Diffusion-7B-Text2World").stdout == output
    assert "text or image or video (continue)" in output
    assert "1280 x 704" in output
    assert "Wan" not in output


def test_catalog_the_json_is_the_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(models(monkeypatch, "--json").stdout) == catalog()
    wan = json.loads(models(monkeypatch, "wan", "--json").stdout)
    assert wan == [describe(find_family("wan"))]
    starts = {p["name"]: (p["image"], p["video"], p["needs"]) for p in wan[0]["pipelines"]}
    assert starts["WanVideoToVideoPipeline"] == (False, "redraw", "video")
    assert wan[0]["recipes"][0]["tokens"] == 75_600


def test_find_family_refuses_a_name_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    result = models(monkeypatch, "stable-diffusion")
    assert result.exit_code == 2
    assert "the families are wan, " in " ".join(result.stderr.split())
    with pytest.raises(SettingError, match="SanaVideoTransformer3DModel stays dense: its self"):
        find_family("SanaVideoTransformer3DModel")


@pytest.mark.parametrize(
    "name", ["stable-diffusion", "Wan", "WAN", "", "[", '"', "transformer\0", "a" * 10**6]
)
def test_check_model_name_refuses_what_no_family_names(name: str) -> None:
    with pytest.raises(SettingError, match="the families are wan, "):
        check_model_name(name)


def test_check_model_name_lets_pass_what_the_catalog_knows() -> None:
    for family in known_families():
        for name in (family.name, *family.checkpoints, *family.transformers):
            check_model_name(name)
    for name in SKIPPED:
        check_model_name(name)
    assert set(PIPELINES) == {family.name for family in known_families()}


def test_models_a_wrong_name_is_refused_before_torch_is_imported() -> None:
    program = (
        "import sys; from svg_models.cli import app\n"
        "try: app()\nexcept SystemExit as end: sys.exit(9 if 'torch' in sys.modules else end.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "models", "cogvideo"], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "did you mean 'cogvideox'?" in done.stderr
