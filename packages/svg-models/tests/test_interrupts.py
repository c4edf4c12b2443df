"""Ctrl-C and SIGTERM at any moment: one true sentence, no traceback, nothing left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from svg_models.interrupts import STATUS, Interrupts, unwinding

LOOP = """
import signal, sys, time
from pathlib import Path
from svg_models.interrupts import listening, unwinding

moment, place = sys.argv[1], Path(sys.argv[2])
with listening() as answer:
    if moment == "importing":
        Path(sys.argv[3]).touch()
        time.sleep(60)
    try:
        with unwinding(place / "clip.mp4"):
            if moment == "finaliser":
                class Gone:
                    def __del__(self):
                        signal.raise_signal(signal.SIGINT)
                Gone()
                print("went on")
            Path(sys.argv[3]).touch()
            time.sleep(60)
    except KeyboardInterrupt:
        if moment == "written":
            (place / "clip.mp4").write_text("whole")
        if moment == "twice":
            Path(sys.argv[3] + "2").touch()
            time.sleep(60)
        print(answer.sentence(), file=sys.stderr)
        sys.exit(130)
"""


def wait_for(marker: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["importing", "running", "twice", "written", "finaliser"])
def test_a_signal_is_one_sentence(moment: str, number: int, tmp_path: Path) -> None:
    marker, place = tmp_path / "marker", tmp_path / "out"
    place.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, moment, str(place), str(marker)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(marker, process)
        if moment != "finaliser":
            process.send_signal(number)
        if moment == "twice":
            wait_for(Path(f"{marker}2"), process)
            process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == STATUS, stderr
    says = f"stopped: {place / 'clip.mp4'} was written"
    says = says if moment == "written" else "stopped: nothing was written"
    assert stderr.strip() == says
    assert stdout == ""


def test_what_was_written_is_told_by_looking(tmp_path: Path) -> None:
    path = tmp_path / "clip\x1b.mp4"
    path.write_text("old")
    answer = Interrupts()
    assert answer.sentence() == "stopped: nothing was written"
    answer.watch(path)
    assert answer.sentence() == "stopped: nothing was written"
    path.write_text("new and longer")
    assert answer.sentence() == f"stopped: {tmp_path}/clip\\x1b.mp4 was written"


def test_handlers_of_others_come_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    hook = sys.unraisablehook
    with unwinding(tmp_path / "clip.mp4"):
        assert isinstance(signal.getsignal(signal.SIGTERM), Interrupts)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert sys.unraisablehook is hook


def test_the_program_answers_signals_while_it_imports(tmp_path: Path) -> None:
    """Half a second into the command torch is on its way in."""
    process = subprocess.Popen(
        [sys.executable, "-m", "svg_models", "generate", "-o", str(tmp_path / "clip.mp4")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == STATUS, stderr
    assert stderr.strip() == "stopped: nothing was written"
    assert stdout == ""
    assert list(tmp_path.iterdir()) == []
