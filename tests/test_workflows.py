"""The workflows parse, run sessions that exist, and release only what was checked."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml
from distributions import distributions

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NOXFILE = (ROOT / "noxfile.py").read_text(encoding="utf-8")
# What a job may write, of what GitHub lets it; no other job may write anything.
WRITES = {
    ("docs", "deploy"): {"pages", "id-token"},
    ("release", "attest"): {"id-token", "attestations"},
    ("release", "publish"): {"id-token"},
    ("release", "announce"): {"contents"},
}


def load(path: Path) -> dict:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["on"] = document.pop(True)  # YAML 1.1 reads the key `on` as a boolean
    return document


def steps(document: dict) -> list[dict]:
    return [step for job in document["jobs"].values() for step in job["steps"]]


def sessions() -> set[str]:
    tree = ast.parse(NOXFILE)
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("nox.session" in ast.unparse(d) for d in node.decorator_list)
    }


def test_the_workflows_are_there():
    assert [path.stem for path in WORKFLOWS] == ["ci", "docs", "gpu", "release", "weekly"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_bounded_and_least_privileged(path):
    document = load(path)
    assert document["permissions"] == {"contents": "read"}
    for name, job in document["jobs"].items():
        assert job["timeout-minutes"] <= 60, f"{name} has no bound"
        wide = {key for key, value in job.get("permissions", {}).items() if value == "write"}
        assert wide <= WRITES.get((path.stem, name), set()), f"{name} may write {wide}"
    for step in steps(document):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_pins_actions_by_commit_and_says_which_version(path):
    lines = re.findall(r"uses: (.+)", path.read_text(encoding="utf-8"))
    assert len(lines) == sum("uses" in step for step in steps(load(path)))
    for line in lines:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_an_action_is_the_same_version_everywhere():
    versions: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for line in re.findall(r"uses: (.+)", path.read_text(encoding="utf-8")):
            versions.setdefault(line.split("@")[0], set()).add(line)
    assert [found for found in versions.values() if len(found) > 1] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_script_never_contains_what_a_stranger_can_write(path):
    """A ref, a title or a label goes through the environment, where a shell does not read it."""
    for step in steps(load(path)):
        for expression in re.findall(r"\$\{\{(.*?)\}\}", step.get("run", "")):
            assert not re.search(r"github\.(event|ref|head)|inputs\.", expression), step["run"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_sessions_that_exist(path):
    named = re.findall(r"--session \"?(\w+)", path.read_text(encoding="utf-8"))
    assert set(named) <= sessions()


def test_gpu_runner_waits_for_the_label():
    document = load(ROOT / ".github/workflows/gpu.yml")
    assert document["on"]["pull_request"]["types"] == ["labeled"]
    assert "github.event.label.name == 'gpu'" in document["jobs"]["gpu"]["if"]


def uses(job: dict, action: str) -> list[dict]:
    return [step for step in job["steps"] if step.get("uses", "").startswith(f"{action}@")]


def test_release_checks_the_tag_before_it_builds_with_the_library():
    job = load(ROOT / ".github/workflows/release.yml")["jobs"]["build"]
    commands = [step.get("run", "") for step in job["steps"]]
    (check,) = (i for i, command in enumerate(commands) if "check_release.py" in command)
    (build,) = (i for i, command in enumerate(commands) if "nox --session build" in command)
    assert check < build
    assert "--compiled" in commands[build]
    assert job["steps"][build]["env"]["SVG_KERNELS_NVCC"] == "wheels"
    assert not [command for command in commands[build + 1 :] if "build" in command]


def test_release_uploads_the_files_that_were_checked():
    """What `build` keeps is what is attested, published and attached; nothing is built twice."""
    document = load(ROOT / ".github/workflows/release.yml")
    jobs = document["jobs"]
    (kept,) = (
        s for s in uses(jobs["build"], "actions/upload-artifact") if s["with"]["name"] == "dist"
    )
    assert kept["with"]["path"] == "dist/${{ steps.check.outputs.package }}"
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    assert "nox --session build -- --dist dist --compiled" in text
    for name in ("attest", "publish", "announce"):
        fetched = uses(jobs[name], "actions/download-artifact")
        assert {"name": "dist", "path": "dist"} in [step["with"] for step in fetched]
        assert not uses(jobs[name], "actions/checkout")
    (attested,) = uses(jobs["attest"], "actions/attest-build-provenance")
    assert attested["with"]["subject-path"] == "dist/*"
    (published,) = uses(jobs["publish"], "pypa/gh-action-pypi-publish")
    assert published["with"]["packages-dir"] == "dist"
    assert published["with"]["attestations"] is True
    assert "password" not in published["with"]
    (release,) = (step["run"] for step in jobs["announce"]["steps"] if "run" in step)
    assert "gh release create" in release
    assert "dist/*" in release
    assert "--notes-file notes.md" in release


def test_release_publishes_last_and_in_the_environment_of_the_package():
    jobs = load(ROOT / ".github/workflows/release.yml")["jobs"]
    assert jobs["publish"]["needs"] == ["build", "attest"]
    assert jobs["publish"]["environment"]["name"] == "pypi-${{ needs.build.outputs.package }}"
    assert jobs["announce"]["needs"] == "publish"


def test_ci_tests_every_package_and_builds_with_the_library():
    jobs = load(ROOT / ".github/workflows/ci.yml")["jobs"]
    layered = sorted(name for name, package in distributions().items() if package.layered)
    assert sorted(jobs["packages"]["strategy"]["matrix"]["package"]) == layered
    (build,) = (s for s in jobs["build"]["steps"] if "session build" in s.get("run", ""))
    assert "--compiled" in build["run"]
    assert build["env"]["SVG_KERNELS_NVCC"] == "wheels"


def test_weekly_runs_what_is_tagged_weekly():
    document = load(ROOT / ".github/workflows/weekly.yml")
    assert len(document["on"]["schedule"]) == 1
    listed = document["jobs"]["list"]["steps"][-1]["run"]
    assert "nox --list --json --tags weekly" in listed
    matrix = document["jobs"]["session"]["strategy"]["matrix"]
    assert matrix == {"session": "${{ fromJSON(needs.list.outputs.sessions) }}"}
    tagged = re.findall(r'tags=\["weekly"\]\)\n(?:@.*\n)*def (\w+)', NOXFILE)
    assert "newest" in tagged


def test_the_front_doors_call_sessions_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^(\w+):", makefile, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    assert set(re.findall(r"--session (\w+)", makefile)) <= sessions()
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
