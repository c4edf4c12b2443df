"""What `benchmarks/quality.py` asks of a judge: the embedded model, or a folder with a card."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from training.train_footage import CARD

ROOT = Path(__file__).resolve().parents[1]
CARD_TEXT = {
    "name": "footage",
    "frames": 45,
    "height": 192,
    "width": 336,
    "guidance": 3.0,
    "prompts": ["clip 0", "clip 4", "clip 9"],
}


@pytest.fixture
def judges(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("_judges")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / CARD).write_text(json.dumps(CARD_TEXT))
    return tmp_path


def test_find_judge_reads_the_card(judges, folder):
    judge = judges.find_judge(folder, first=32, prompts=2)
    assert judge.name == "footage"
    assert judge.sizes == {"footage": (192, 336)}
    assert judge.measured == ("footage",)
    assert (judge.frames, judge.guidance) == (45, 3.0)
    assert judge.prompts == ("clip 0", "clip 4")


def test_find_judge_refuses_more_prompts_than_the_card_has(judges, folder):
    with pytest.raises(SystemExit, match="3 prompts"):
        judges.find_judge(folder, first=0, prompts=4)


def test_find_judge_gives_the_embedded_model_prompts_that_chose_nothing(judges, tmp_path):
    judge = judges.find_judge(None, first=32, prompts=16)
    stored = json.loads((ROOT / "benchmarks/results/h100/quality.json").read_text("utf-8"))
    assert list(judge.prompts) == stored["prompts"]
    assert (judge.frames, judge.guidance) == (stored["frames"], stored["guidance"])
    assert judge.sizes["large"] == (256, 256)
    assert judges.find_judge(tmp_path, first=32, prompts=16) == judge, "a folder without a card"


def test_cases_of_another_judge_begin_with_what_it_has_to_answer(judges, monkeypatch):
    found = importlib.import_module("_quality_cases")
    cases = [case for case in found.cases(("footage",)) if isinstance(case, found.Case)]
    first = cases[0]
    assert (first.method, first.density, first.total) == ("compensation", 0.25, False)
    assert {case.size for case in cases} == {"footage"}
    equal = [case.method for case in cases[1:4] if case.density == 0.12]
    assert found.PRESET in equal
    assert found.cases(("default",)).__next__().size == "default"
