"""What is known of models, and how `svg models` tells it."""

from __future__ import annotations

import inspect
import json
import typing

import diffusers
import pytest
from click.testing import Result
from typer.testing import CliRunner

from svg_models.catalog import PIPELINES, catalog, describe, find_family
from svg_models.cli import app
from svg_models.errors import SettingError
from svg_models.families import known_families


def models(monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    monkeypatch.setenv("COLUMNS", "160")
    return CliRunner().invoke(app, ["models", *words])


@pytest.mark.parametrize("family", known_families(), ids=lambda family: family.name)
def test_catalog_the_pipelines_of_a_family_run_its_transformers(family: typing.Any) -> None:
    names = PIPELINES.get(family.name, ())
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
