"""The benchmark of whole transformers: its shapes, and its logic on toy models."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from svg_models.families import family_of
from svg_models.recipes import recipe_for

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not FOLDER.exists():
        pytest.skip("the benchmarks are not part of this checkout")
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("bench_models")


def test_subjects_have_the_shapes_of_the_published_models(bench: Any) -> None:
    for subject in (*bench.SUBJECTS, *bench.TINY):
        with torch.device("meta"):
            model = getattr(diffusers, subject.kind)(**subject.config)
        family = family_of(model)
        latents = torch.empty(1, *subject.latents, device="meta")
        assert math.prod(family.grid(model, {"hidden_states": latents})) == subject.tokens
        assert len(family.find_attentions(model)) == subject.layers
        assert model.config.in_channels == subject.latents[0]
    for subject in bench.SUBJECTS:
        with torch.device("meta"):
            model = getattr(diffusers, subject.kind)(**subject.config)
        published = recipe_for(model, subject.tokens)
        assert published.note == ""
        assert (published.method.q_clusters, published.method.k_clusters) == subject.clusters


def test_weights_are_in_the_precisions_that_diffusers_loads(bench: Any) -> None:
    model = bench.build(bench.TINY[0], "cpu")
    dtypes = {name: tensor.dtype for name, tensor in model.named_parameters()}
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert dtypes["blocks.0.attn1.norm_q.weight"] == torch.bfloat16
    assert dtypes["blocks.0.norm2.weight"] == torch.float32
    assert dtypes["blocks.0.scale_shift_table"] == torch.float32
    assert model.rope.freqs_cos.dtype == torch.float32


def test_a_run_on_toy_models_fills_the_page(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.main(["run", "--tiny", "--output", str(tmp_path), "--rounds", "1"])
    result = json.loads((tmp_path / "models.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in result["models"]] == ["tiny Wan", "tiny HunyuanVideo"]
    for model in result["models"]:
        names = ["diffusers", "dense steps, attention alone", "dense steps"]
        names += ["SVG2, attention alone", "SVG2", "SVG1"]
        assert list(model["ms_per_forward"]) == names
        assert model["density"]["dense steps"] == 1.0
        assert 0.1 < model["density"]["SVG2"] < 0.5
        assert set(model["error_vs_fp32"]) == {"diffusers", "dense steps", "density 1"}
    model["ms_per_forward"] = {
        "diffusers": {"median": 600.0, "q1": 590.0, "q3": 610.0},
        "SVG2": {"median": 200.0, "q1": 198.0, "q3": 204.0},
    }
    model["ms_by_kind"] = {"SVG2": {"attention": 100.0, "matrix products": 60.0, "the rest": 40.0}}
    lines = bench.rows_of(model)
    assert lines[0][2:4] == ["300.0 (295.0 to 305.0)", "1.00"]
    assert lines[1][2:5] == ["100.0 (99.0 to 102.0)", "3.00", "1.0"]
    page = tmp_path / "speed.md"
    page.write_text(bench.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    names = ("gpu", "driver", "cuda", "torch", "triton", "commit", "date")
    result["environment"] = dict.fromkeys(names, "x")
    monkeypatch.setattr(bench, "PAGE", page)
    monkeypatch.setattr(bench, "load", lambda gpu, name: result)
    bench.main(["table", "--gpu", "h200"])
    text = page.read_text(encoding="utf-8")
    assert "| tiny HunyuanVideo | SVG2 | 100.0 (99.0 to 102.0) | 3.00 | 1.0 |" in text
    assert "| tiny HunyuanVideo | SVG2 | 50.0 | 30.0 | 20.0 |" in text
    assert "192 video tokens and 6 of text, 2 layers" in text
    assert "Not measured yet" not in text


def test_a_model_that_sparsify_changes_is_not_timed(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "Dense", lambda: bench.SVG2(q_clusters=4, k_clusters=12, top_p=0.1))
    with pytest.raises(RuntimeError, match="a dense run is not what diffusers computes"):
        bench.main(["run", "--tiny", "--output", str(tmp_path)])
    assert not (tmp_path / "models.json").exists()
