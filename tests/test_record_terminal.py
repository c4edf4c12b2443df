"""The recording of a terminal shows what a terminal would."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import record_terminal
from distributions import ROOT
from record_terminal import LONGEST, READING, Terminal, draw, joined, record, thinned, without_times

SVG = "{http://www.w3.org/2000/svg}"


def text(screen):
    return ["".join(run for run, _ in line) for line in screen]


def test_terminal_writes_lines_again_as_a_progress_bar_does():
    terminal = Terminal(columns=20, rows=3)
    terminal.write("loading\r\nsampling 1/2")
    terminal.write("\r\x1b[2K\x1b[1A\x1b[2K")
    assert text(terminal.screen()) == ["", ""]
    terminal.write("\x1b[?25ldone\r\nvideo.mp4\r\n\x1b[?25h")
    assert text(terminal.screen()) == ["done", "video.mp4", ""]
    terminal.write("a" * 21)
    assert text(terminal.screen()) == ["video.mp4", "a" * 20, "a"]


def test_terminal_paints_as_it_is_told():
    terminal = Terminal()
    terminal.write("\x1b[1;31merror:\x1b[0m no \x1b[2mcolour\x1b[0m")
    ((error, no, colour),) = terminal.screen()
    assert (error[0], error[1].bold, error[1].colour) == ("error:", True, "#f87171")
    assert (no[0], no[1].bold) == (" no ", False)
    assert colour[1].colour == record_terminal.MUTED


def test_without_times_says_nothing_of_how_long_it_took():
    terminal = Terminal()
    terminal.write(
        "sampling \x1b[32m 4/20\x1b[0m \x1b[33m0:00:38\x1b[0m \x1b[36m9.7 s/step, 2:36 left\x1b[0m"
    )
    terminal.write("\r\n49 frames of 128 x 128 in 346.9 s with SVG2, density 30%")
    assert text(without_times(terminal.screen())) == [
        "sampling  4/20",
        "49 frames of 128 x 128 with SVG2, density 30%",
    ]


def test_joined_shortens_pauses_and_keeps_time_to_read():
    one, other = ((("a", record_terminal.Style()),),), ()
    assert joined([(one, LONGEST), (one, LONGEST), (one, READING), (other, 0.1)]) == [
        (one, LONGEST + READING),
        (other, 0.1),
    ]


def test_thinned_keeps_the_ends():
    frames = [((), float(number)) for number in range(1000)]
    kept = [seconds for _, seconds in thinned(frames, 50)]
    assert (len(kept), kept[0], kept[-1]) == (50, 0.0, 999.0)
    assert thinned(frames[:9], 50) == frames[:9]


def test_record_runs_the_commands_and_draws_every_line(tmp_path):
    said = "print('first'); print('<second>')"
    frames = record([f'{sys.executable} -c "{said}"'])
    assert text(frames[-1][0])[-3:] == ["first", "<second>", ""]
    root = ElementTree.fromstring(draw(frames))
    lines = ["".join(line.itertext()) for line in root.iter(f"{SVG}text")]
    assert {"first", "<second>"} <= set(lines)
    shown = [line for line in root.iter(f"{SVG}text") if line.get("opacity") is None]
    assert ["".join(line.itertext()) for line in shown][-2:] == ["first", "<second>"]
    for clock in root.iter(f"{SVG}animate"):
        times = [float(t) for t in clock.get("keyTimes").split(";")]
        assert times == sorted(times)
        assert times[0] == 0
        assert len(times) == len(clock.get("values").split(";"))


def test_record_refuses_a_command_that_fails():
    with pytest.raises(RuntimeError, match="ended with 3"):
        record([f'{sys.executable} -c "raise SystemExit(3)"'])


def test_the_recording_is_of_the_commands_and_stands_on_both_first_pages():
    path: Path = record_terminal.TARGET
    source = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 1 << 20
    assert "href" not in source, "a picture on a page loads nothing else"
    root = ElementTree.fromstring(source)
    lines = ["".join(line.itertext()) for line in root.iter(f"{SVG}text")]
    for command in record_terminal.COMMANDS:
        assert f"${command}" in {line.replace(" ", "") for line in lines} | {
            re.sub(r"^\$ ?", "$", line) for line in lines
        }
    assert any("sampling" in line for line in lines), "the wait is shown, too"
    # What a wait took is left out, since it is cut short; what was measured stands in the table.
    waits = [line for line in lines if "\N{BOX DRAWINGS LIGHT VERTICAL}" not in line]
    assert not any(re.search(r"\d s\b|s/step|\d:\d\d", line) for line in waits)
    assert any(line.startswith("page:") for line in lines)
    for page, address in (("README.md", f"docs/assets/{path.name}"), ("docs/index.md", path.name)):
        assert address in (ROOT / page).read_text(encoding="utf-8"), page
