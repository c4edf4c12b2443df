"""Processes that work together: started, heard, and gone, whatever becomes of one of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks_at_work
from processes import children, gone
from ranks_at_work import TWO, work

from svg_models.errors import LostRankError, OutputError, SettingError
from svg_models.launch import Group, finished

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks into /proc"),
]


def quiet(*_: object) -> None:
    pass


@pytest.fixture
def group() -> Iterator[Group]:
    with Group(TWO, work) as made:
        yield made
    assert children(os.getpid()) == set()


def test_tasks_are_done_by_the_same_processes_each_in_its_place(group: Group) -> None:
    stages: list[tuple[str, float, float]] = []
    first = group.run({}, lambda *stage: stages.append(stage))
    assert first[1:] == ("5", 0, 2)
    assert stages == [("sampling", 3, 10)], "only rank 0 is heard"
    assert group.run({}, quiet) == first
    assert "SEEN" not in os.environ


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("act", "how"),
    [
        ("signal SIGKILL", "was ended by SIGKILL while sampling, 3 of 10: the system does so when"),
        ("signal SIGSEGV", "was ended by SIGSEGV while sampling, 3 of 10: run it again"),
        ("exit 3", 'exit code 3 while sampling, 3 of 10, saying "the GPU has fallen off the bus"'),
    ],
)
def test_a_rank_that_is_gone_is_one_sentence_within_seconds(
    act: str, how: str, rank: int, group: Group
) -> None:
    group.run({}, quiet)
    processes = children(os.getpid())
    assert len(processes) == 2
    began = time.monotonic()
    with pytest.raises(LostRankError) as caught:
        group.run({rank: act, 1 - rank: "wait 60"}, quiet)
    assert time.monotonic() - began < 5
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.startswith(f"the process of GPU {5 + rank} (rank {rank} of 2) ")
    assert how in sentence
    assert gone(processes, within=0)
    assert group.run({}, quiet)[0] not in processes, "the next task begins anew"


def test_a_rank_that_is_gone_between_two_tasks_is_told_of_the_next(group: Group) -> None:
    os.kill(group.run({}, quiet)[0], signal.SIGKILL)
    with pytest.raises(LostRankError, match=r"GPU 5 \(rank 0 of 2\) was ended by SIGKILL"):
        group.run({}, quiet)


def test_an_error_of_one_rank_ends_the_others(group: Group) -> None:
    group.run({}, quiet)
    processes = children(os.getpid())
    with pytest.raises(ZeroDivisionError, match="by mistake") as caught:
        group.run({1: "break by mistake", 0: "wait 60"}, quiet)
    assert "in act\n" in str(caught.value.__cause__), "with the traceback of the other process"
    assert gone(processes, within=0)


def test_an_error_of_all_ranks_leaves_them_ready(group: Group) -> None:
    pid = group.run({}, quiet)[0]
    with pytest.raises(SettingError, match="refused both"):
        group.run({0: "refuse both", 1: "refuse both"}, quiet)
    assert group.run({}, quiet)[0] == pid


def test_an_error_that_a_person_can_mend_comes_before_what_follows_from_it(group: Group) -> None:
    with pytest.raises(SettingError, match="refused one"):
        group.run({0: "break connection", 1: "refuse one"}, quiet)


def test_a_full_disk_of_another_rank_is_a_sentence(group: Group) -> None:
    with pytest.raises(OutputError, match=r"GPU 6 cannot write /cache/kernel.so \(no space left"):
        group.run({1: "full", 0: "wait 60"}, quiet)


def test_an_error_that_cannot_be_sent_keeps_its_name(group: Group) -> None:
    with pytest.raises(RuntimeError, match="Odd: one two"):
        group.run({0: "odd", 1: "odd"}, quiet)


def test_notes_of_rank_0_are_warnings_here(group: Group) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        group.run({0: "note too short", 1: "note too short"}, quiet)
    assert [str(warning.message) for warning in caught] == ["too short"]


def test_groups_are_heard_as_they_finish_and_given_more() -> None:
    with Group(TWO[:1], work) as slow, Group(TWO[1:], work) as fast:
        fast.run({}, quiet)
        slow.run({}, quiet)
        slow.send({0: "wait 1"}, quiet)
        fast.send({}, quiet)
        order, left = [], ["signal SIGKILL", "answer"]
        for group, result in finished([slow, fast]):
            order.append((group is fast, result.error is None))
            if group is fast and left:
                fast.send({0: left.pop(0)}, quiet)
    assert sorted(order) == [(False, True), (True, False), (True, True), (True, True)]
    assert order[0] == (True, True)
    assert children(os.getpid()) == set()


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a command whose two ranks wait."""
    marker = tmp_path / "marker"
    process = subprocess.Popen(
        [sys.executable, ranks_at_work.__file__, str(marker), "wait 60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whom", ["group", "parent"])
def test_a_signal_ends_all_with_one_sentence(
    number: signal.Signals, whom: str, waiting: subprocess.Popen[str]
) -> None:
    processes = children(waiting.pid)
    assert len(processes) == 2
    (os.killpg if whom == "group" else os.kill)(waiting.pid, number)
    stdout, stderr = waiting.communicate(timeout=20)
    assert (waiting.returncode, stdout) == (130, ""), stderr
    assert stderr == "stopped: nothing was written\n"
    assert gone(processes, within=0)


def test_ranks_end_with_a_parent_that_was_killed(waiting: subprocess.Popen[str]) -> None:
    processes = children(waiting.pid)
    assert len(processes) == 2
    os.kill(waiting.pid, signal.SIGKILL)
    assert gone(processes)


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    """Ranks that do not heed SIGTERM have three seconds; who presses again does not wait."""
    marker = tmp_path / "marker"
    process = subprocess.Popen(
        [sys.executable, ranks_at_work.__file__, str(marker), "deaf"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not marker.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.5)  # until they are deaf
        processes = children(process.pid)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
        assert time.monotonic() - began < 1.5
        assert process.returncode == 130
        assert stderr == "stopped: nothing was written\n"
        assert gone(processes)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_script_without_its_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import ranks_at_work\n"
        "from svg_models.launch import Group\n"
        "with Group(ranks_at_work.TWO, ranks_at_work.work) as group:\n"
        "    group.run({}, lambda *_: None)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "belongs under `if __name__ == '__main__':`" in done.stderr.strip().splitlines()[-1]
