"""The workflows parse, run sessions that exist, and release only what was checked."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(path: Path) -> dict:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["on"] = document.pop(True)  # YAML 1.1 reads the key `on` as a boolean
    return document


def steps(document: dict) -> list[dict]:
    return [step for job in document["jobs"].values() for step in job["steps"]]


def sessions() -> set[str]:
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("nox.session" in ast.unparse(d) for d in node.decorator_list)
    }


def test_the_four_workflows_are_there():
    assert [path.stem for path in WORKFLOWS] == ["ci", "docs", "gpu", "release"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_bounded_pinned_and_least_privileged(path):
    document = load(path)
    assert document["permissions"] == {"contents": "read"}
    for name, job in document["jobs"].items():
        assert job["timeout-minutes"] <= 60, f"{name} has no bound"
    for step in steps(document):
        if "uses" in step:
            assert re.fullmatch(r"[\w./-]+@(v\d+|release/v\d+)", step["uses"]), step["uses"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_sessions_that_exist(path):
    named = re.findall(r"--session \"?(\w+)", path.read_text(encoding="utf-8"))
    assert set(named) <= sessions()


def test_gpu_runner_waits_for_the_label():
    document = load(ROOT / ".github/workflows/gpu.yml")
    assert document["on"]["pull_request"]["types"] == ["labeled"]
    assert "github.event.label.name == 'gpu'" in document["jobs"]["gpu"]["if"]


def test_release_publishes_only_what_the_check_let_through():
    document = load(ROOT / ".github/workflows/release.yml")
    commands = [step.get("run", "") for step in document["jobs"]["build"]["steps"]]
    checks = [i for i, command in enumerate(commands) if "check_release.py" in command]
    builds = [i for i, command in enumerate(commands) if "build --outdir" in command]
    assert checks < builds
    assert document["jobs"]["publish"]["needs"] == "build"
    assert document["jobs"]["publish"]["permissions"] == {"id-token": "write"}


def test_the_front_doors_call_sessions_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^(\w+):", makefile, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    assert set(re.findall(r"--session (\w+)", makefile)) <= sessions()
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
