"""Many clips side by side: dealt, made again where a process was lost, gone on with, written."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks_at_work
import tiny
from processes import children, gone
from typer.testing import CliRunner

from svg_models.cli import app
from svg_models.errors import ModelUnavailableError, SvgModelsError
from svg_models.generation.batch import BatchClip
from svg_models.generation.makers import check_groups, groups_of, make_on_groups
from svg_models.generation.request import GenerateRequest
from svg_models.launch import Group
from svg_models.loading import quiet

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks into /proc"),
]


@pytest.fixture
def two() -> Iterator[list[Group]]:
    groups = [Group([place], ranks_at_work.clips) for place in ranks_at_work.TWO]
    with groups[0], groups[1]:
        yield groups
    assert children(os.getpid()) == set()


def make(groups: list[Group], *prompts: str) -> dict[str, Any]:
    """Return what became of each prompt."""
    clips = [
        BatchClip(name=f"{n}", request=GenerateRequest(prompt=prompt), line=n)
        for n, prompt in enumerate(prompts)
    ]
    found = {}
    for clip, result in make_on_groups(clips, groups, lambda clip, number: quiet):
        assert clip.request.prompt not in found
        found[clip.request.prompt] = result
    assert set(found) == set(prompts)
    return found


def test_clips_are_dealt_to_whoever_is_free(two: list[Group]) -> None:
    found = make(two, "wait 2", *(f"answer {n}" for n in range(6)))
    assert {place for place, _, _ in found.values()} == {"5", "6"}
    assert len({pid for _, pid, _ in found.values()}) == 2, "each process makes many"
    long = found.pop("wait 2")
    assert sum(result == long for result in found.values()) < 3


def test_the_clip_of_a_lost_process_is_made_by_another(two: list[Group], tmp_path: Path) -> None:
    found = make(two, f"signal SIGKILL once {tmp_path / 'a'}", "wait 1", "answer 1", "answer 2")
    assert not any(isinstance(result, Exception) for result in found.values())
    first = found[f"signal SIGKILL once {tmp_path / 'a'}"]
    assert first[0] == "6", "the first group has lost it"


def test_a_clip_that_ends_its_process_twice_is_told_and_the_others_are_made(
    two: list[Group],
) -> None:
    found = make(two, "exit 3", "wait 0.5", *(f"answer {n}" for n in range(4)))
    lost = found.pop("exit 3")
    assert isinstance(lost, SvgModelsError)
    assert "ended with exit code 3" in str(lost)
    assert not any(isinstance(result, Exception) for result in found.values())


def test_errors_of_one_clip_are_its_own(two: list[Group]) -> None:
    found = make(two, "refuse this", "break that", "full", "answer", "wait 0.1")
    assert str(found["refuse this"]) == "refused this"
    assert str(found["break that"]) == "ZeroDivisionError: that"
    assert "no space left on device" in str(found["full"])
    assert found["answer"][2] == found["wait 0.1"][2] == 1


def test_a_group_that_fails_twice_in_a_row_gets_no_more(tmp_path: Path) -> None:
    """As a GPU that has gone: its first process dies, and the next ones find no GPU."""
    with Group(ranks_at_work.TWO[:1], ranks_at_work.clips) as only:
        found = make([only], "exit 1", "exit 4", "answer 1", "answer 2")
    assert all(isinstance(result, SvgModelsError) for result in found.values())
    assert "no GPU is left" in str(found["answer 2"])


def test_a_model_that_is_not_there_ends_the_batch(two: list[Group]) -> None:
    with pytest.raises(ModelUnavailableError, match="no model here"):
        make(two, "absent here", "absent here ", "absent  here")


def test_groups_are_dealt_evenly() -> None:
    groups = groups_of(GenerateRequest(gpus=6, device="cpu"), 2)
    assert [group.size for group in groups] == [2, 2, 2]
    with pytest.raises(SvgModelsError, match="3 GPUs cannot be dealt in groups of 2"):
        check_groups(3, 2)


SMALL = ["--size", "48x48", "--frames", "5", "--steps", "2", "--guidance", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.pipeline().save_pretrained(path)
    return str(path)


def test_svg_batch_gpus_makes_all_and_goes_on(folder: str, tmp_path: Path) -> None:
    lines, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    rows = [
        {"prompt": "a red circle", "method": "svg2@0.5"},
        {"prompt": "a green square", "frames": 6},
        {"prompt": "a blue circle", "seed": 4},
    ]
    lines.write_text("\n".join(map(json.dumps, rows)))
    words = ["batch", str(lines), "-m", folder, *SMALL, "--gpus", "2", "-o", str(out)]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 2, result.output
    values = json.loads(result.stdout)
    assert [(value["line"], value["made"]) for value in values] == [
        (1, True),
        (2, False),
        (3, True),
    ]
    assert "frames must be a multiple of 4 plus 1, got 6" in values[1]["error"]
    assert [values[n]["gpus"] for n in (0, 2)] == [1, 1]
    assert children(os.getpid()) == set()

    rows[1] = {"prompt": "a green square"}
    lines.write_text("\n".join(map(json.dumps, rows)))
    result = CliRunner().invoke(app, [*words, "--gpus-per-clip", "2"])
    assert result.exit_code == 0, result.output
    made = {path.name: json.loads(path.read_text())["gpus"] for path in out.glob("*.json")}
    assert made == {
        "0001-a-red-circle.json": 1,
        "0002-a-green-square.json": 2,
        "0003-a-blue-circle.json": 1,
    }, "only what was missing was made, by both together"
    assert "a green square" in result.stdout
    assert (out / "contact-sheet.jpg").is_file()
    assert not list(out.glob(".svg-*"))
    assert children(os.getpid()) == set()


def test_svg_batch_gpus_keeps_what_is_done_at_ctrl_c(folder: str, tmp_path: Path) -> None:
    lines, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    rows = [{"prompt": "a red circle"}, {"prompt": "a green square", "steps": 9000}]
    lines.write_text("\n".join(map(json.dumps, rows)))
    words = [sys.executable, "-m", "svg_models", "batch", str(lines), "-m", folder, *SMALL]
    process = subprocess.Popen(
        [*words, "--gpus", "2", "-o", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "0001-a-red-circle.json").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        time.sleep(0.5)
        processes = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, stdout) == (130, ""), stderr
    assert "stopped: 1 of 2 clips are in" in stderr
    assert "Traceback" not in stderr
    assert len(processes) == 2
    assert gone(processes, within=0)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["0001-a-red-circle.json", "0001-a-red-circle.mp4"]
