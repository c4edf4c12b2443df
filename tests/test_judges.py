"""What `benchmarks/quality.py` asks of a judge: the embedded model, or a folder with a card."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from training.card import CARD

from svg_attention import TokenLayout

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
    asked = [(case.steps, case.schedule, case.method, case.density) for case in cases]
    # What the first minutes answer: the density equal to 25 %, and whether a step need be dense.
    equal = asked.index((20, "dense for 30 %", found.PRESET, 0.12))
    assert equal < asked.index((8, "no dense step", found.BASELINE, 0.35)) < 12
    assert asked.index((4, "no dense step", found.PRESET, 0.35)) < 26
    assert found.cases(("default",)).__next__().size == "default"


def test_find_judge_reads_sizes_and_steps_of_a_few_step_card(judges, tmp_path):
    sizes = {"default": [128, 128], "large": [256, 256]}
    card = {"name": "embedded4", "sizes": sizes, "steps": 4, "guidance": 1.0, "frames": 49}
    (tmp_path / CARD).write_text(json.dumps({**card, "prompts": ["a red star"]}))
    judge = judges.find_judge(tmp_path, first=32, prompts=1)
    assert judge.sizes == {"default": (128, 128), "large": (256, 256)}
    assert judge.measured == ("default", "large")
    assert (judge.name, judge.steps, judge.guidance) == ("embedded4", 4, 1.0)
    assert judges.find_judge(None, first=0, prompts=1).steps is None


def test_cases_of_a_few_step_judge_have_its_steps_and_no_dense_one(judges):
    found = importlib.import_module("_quality_cases")
    asked = list(found.cases(("default", "large"), steps=4))
    assert {(case.steps, case.schedule, case.total) for case in asked} == {
        (4, "no dense step", True)
    }
    assert len({case.key for case in asked}) == len(asked) == 2 * 3 * 4
    assert {case.density for case in asked} == {0.25, 0.35, 0.5}
    methods = {found.PRESET, found.BEST, found.BASELINE, "compensation"}
    assert {case.method for case in asked} == methods


def test_sparse_density_counts_the_probes_of_every_branch(judges):
    found = importlib.import_module("_quality_cases")
    layout = TokenLayout(grid=(1, 1, 3328))
    one, two = (
        found.Case(
            size="default", steps=4, schedule="no dense step", method=found.BEST, density=0.5,
            total=True,
        ).sparse_density(layout, branches=branches)
        for branches in (1, 2)
    )  # fmt: skip
    method = found.build(found.BEST, 0.5, layout.tokens)
    repair = method.repair_rows / layout.tokens
    assert one == pytest.approx(0.5 - method.probe_density(layout))
    assert two == pytest.approx(0.5 - repair - (method.probe_density(layout) - repair) / 2)


def test_join_puts_lanes_in_the_order_of_the_cases(judges, tmp_path):
    quality = importlib.import_module("quality")
    found = importlib.import_module("_quality_cases")
    keys = list(
        dict.fromkeys(c.key for c in found.cases(("footage",)) if isinstance(c, found.Case))
    )
    header = {"environment": {}, "judge": "footage", "guidance": 3.0, "frames": 45}
    header |= {"clips": {"footage": {"height": 192, "width": 336, "tokens": 12_096}}, "prompts": []}
    parts = []
    for number in range(2):
        number_of, count = quality.lane(f"{number}/2")
        rows = {key: {"size": "footage", "key": key} for key in keys[number_of::count]}
        part = tmp_path / f"{number}.json"
        part.write_text(
            json.dumps({**header, "noise_floor": {}, "cases": rows, "times": {}, "failures": {}})
        )
        parts.append(part)
    quality.join(parts, tmp_path / "whole.json")
    whole = json.loads((tmp_path / "whole.json").read_text("utf-8"))
    assert list(whole["cases"]) == keys
    embedded = ROOT / "benchmarks/results/h100/quality.json"
    quality.join(parts, tmp_path / "whole.json", embedded)
    timed = json.loads((tmp_path / "whole.json").read_text("utf-8"))["times"]
    assert timed["dense"]["median"] > 0
    assert all(row["device"] for row in timed.values()), "times say what they were taken on"
    parts[1].write_text(json.dumps({**json.loads(parts[1].read_text("utf-8")), "frames": 9}))
    with pytest.raises(SystemExit, match="other frames"):
        quality.join(parts, tmp_path / "whole.json")
