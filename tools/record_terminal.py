"""Record `docs/assets/first-minute.svg`: a newcomer's first commands, as a terminal shows them.

    python tools/record_terminal.py

The commands below run for real in a pseudo-terminal, and the picture has what it showed, with
pauses shortened and times left out: they are those of one machine at one moment.
"""

from __future__ import annotations

import fcntl
import html
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from distributions import ROOT

TARGET = ROOT / "docs" / "assets" / "first-minute.svg"
COMMANDS = (
    'svg generate "a large red star moving right on a plain navy background" -o star.mp4',
    "svg compare --method svg2-error --method svg1",
)
COLUMNS, ROWS = 92, 24
LONGEST = 0.14  # seconds that a pause keeps
MOST = 70  # screens that are kept of a command's wait
TYPING = 0.03  # seconds a character
READING = 2.5  # seconds after a command has ended
SAMPLE = 0.4  # seconds between two looks at the terminal

# grey, red, green, yellow, blue, magenta, cyan and white, then the same brighter
_PLAIN = ("#6b7280", "#f87171", "#86efac", "#fcd34d", "#93c5fd", "#f0abfc", "#67e8f9", "#e5e7eb")
_BRIGHT = ("#6b7280", "#fca5a5", "#86efac", "#fde68a", "#bfdbfe", "#f5d0fe", "#a5f3fc", "#ffffff")
COLOURS = {
    start + index: colour
    for start, colours in ((30, _PLAIN), (90, _BRIGHT))
    for index, colour in enumerate(colours)
}
INK, PAPER, MUTED = "#d8dee9", "#161b26", "#6b7280"
WIDE, HIGH, LEFT, TOP = 8.4, 19, 16, 42  # pixels of a cell, and where the first one stands


@dataclass(frozen=True)
class Style:
    """How a cell is drawn."""

    colour: str = INK
    bold: bool = False


@dataclass(frozen=True)
class Cell:
    """One character of the terminal."""

    text: str = " "
    style: Style = field(default_factory=Style)


Line = tuple[tuple[str, Style], ...]
Screen = tuple[Line, ...]


class Terminal:
    """The part of a terminal that rich makes use of: colours, and lines written again."""

    _CODES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b\][^\x07]*\x07|[\r\n]|[^\x1b\r\n]")

    def __init__(self, columns: int = COLUMNS, rows: int = ROWS) -> None:
        self.columns, self.rows = columns, rows
        self.lines: list[list[Cell]] = [[]]
        self.row = self.column = 0
        self.style = Style()

    def write(self, text: str) -> None:
        """Take what a program wrote."""
        for match in self._CODES.finditer(text):
            if match[2] is not None:
                self._control(match[1], match[2])
            elif match[0] == "\r":
                self.column = 0
            elif match[0] == "\n":
                self._go_down()
            elif not match[0].startswith("\x1b"):
                self._put(match[0])

    def screen(self) -> Screen:
        """Return the last rows, each as runs of one style."""
        return tuple(_runs(line) for line in self.lines[-self.rows :])

    def _put(self, character: str) -> None:
        if self.column >= self.columns:
            self.column = 0
            self._go_down()
        line = self.lines[self.row]
        line.extend([Cell()] * (self.column + 1 - len(line)))
        line[self.column] = Cell(character, self.style)
        self.column += 1

    def _go_down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])

    def _control(self, numbers: str, letter: str) -> None:
        values = [int(n or 0) for n in numbers.split(";")] if "?" not in numbers else []
        if letter == "A":
            self.row = max(0, self.row - (values[0] or 1))
        elif letter == "K":
            self.lines[self.row] = [] if values[0] == 2 else self.lines[self.row][: self.column]
        elif letter == "m":
            for value in values:
                self._paint(value)

    def _paint(self, value: int) -> None:
        if value == 0:
            self.style = Style()
        elif value == 1:
            self.style = replace(self.style, bold=True)
        elif value == 2:
            self.style = replace(self.style, colour=MUTED)
        elif value == 39:
            self.style = replace(self.style, colour=INK)
        elif value in COLOURS:
            self.style = replace(self.style, colour=COLOURS[value])


def _runs(line: Sequence[Cell]) -> Line:
    runs: list[tuple[str, Style]] = []
    for cell in line:
        if runs and runs[-1][1] == cell.style:
            runs[-1] = (runs[-1][0] + cell.text, cell.style)
        else:
            runs.append((cell.text, cell.style))
    while runs and not runs[-1][0].strip():
        runs.pop()
    return tuple(runs)


def watch(words: Sequence[str], folder: Path) -> Iterator[str]:
    """Run a command in a pseudo-terminal; yield what it wrote, a little at a time.

    Raises:
        RuntimeError: if it fails.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    sizes = {"COLUMNS": str(COLUMNS), "LINES": str(ROWS), "TERM": "xterm"}
    environment = os.environ | sizes | {"COLORTERM": "", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment
    )
    os.close(theirs)
    try:
        while True:
            until, parts = time.monotonic() + SAMPLE, []
            try:
                while time.monotonic() < until:
                    parts.append(os.read(ours, 1 << 16))
                    if not parts[-1]:
                        break
            except OSError:  # the other end is closed
                parts.append(b"")
            yield b"".join(parts).decode("utf-8", "replace")
            if not parts[-1]:
                break
    finally:
        os.close(ours)  # which ends a command that still runs
    if process.wait() != 0:
        raise RuntimeError(f"{shlex.join(words)} ended with {process.returncode}")


def record(commands: Sequence[str]) -> list[tuple[Screen, float]]:
    """Run commands one after the other; return each screen with the seconds that it stays."""
    terminal, frames = Terminal(), []
    with tempfile.TemporaryDirectory() as folder:
        for command in commands:
            terminal.write("\x1b[1;92m$\x1b[0m ")
            frames.append((terminal.screen(), 0.6))
            for start in range(0, len(command), 3):
                terminal.write(command[start : start + 3])
                frames.append((terminal.screen(), 3 * TYPING))
            terminal.write("\r\n")
            program, *rest = shlex.split(command)
            wait = []
            for text in watch([shutil.which(program) or program, *rest], Path(folder)):
                text = text.replace(os.path.realpath(folder), "~").replace(folder, "~")
                terminal.write(text)
                wait.append((terminal.screen(), LONGEST))
            frames += thinned(joined(wait))
            frames.append((terminal.screen(), READING))
            terminal.write("\r\n")
    frames.append((frames[-1][0], READING))
    return joined([(without_times(screen), seconds) for screen, seconds in frames])


def thinned(frames: Sequence[tuple[Screen, float]], most: int = MOST) -> list[tuple[Screen, float]]:
    """Return at most so many of the frames, evenly, the first and the last among them."""
    if len(frames) <= most:
        return list(frames)
    step = (len(frames) - 1) / (most - 1)
    return [frames[round(index * step)] for index in range(most)]


_TIMES = (
    re.compile(r"\d:\d\d:\d\d$"),  # since a stage began
    re.compile(r"^[\d.]+ (s/step|steps/s).*|^\d+:\d\d left$"),
    re.compile(r" in [\d.]+ s(?= with )"),
)


def without_times(screen: Screen) -> Screen:
    """Return a screen without the seconds that anything took or will take."""
    lines = []
    for line in screen:
        kept = [(_leave_out(text), style) for text, style in line]
        while kept and not kept[-1][0].strip():
            kept.pop()
        lines.append(tuple(kept))
    return tuple(lines)


def _leave_out(text: str) -> str:
    for times in _TIMES:
        text = times.sub("", text)
    return text


def joined(frames: Sequence[tuple[Screen, float]]) -> list[tuple[Screen, float]]:
    """Return the frames, with those that follow an equal one joined to it."""
    found: list[tuple[Screen, float]] = []
    for screen, seconds in frames:
        if found and found[-1][0] == screen:
            kept = found[-1][1]
            found[-1] = (screen, max(kept, seconds) if seconds <= LONGEST else kept + seconds)
        else:
            found.append((screen, seconds))
    return found


def draw(frames: Sequence[tuple[Screen, float]]) -> str:
    """Return the frames as an SVG that plays by itself; without movement it shows the last.

    A line that stays the same over several frames is drawn once.
    """
    ends, total = [], 0.0
    for _, seconds in frames:
        total += seconds
        ends.append(total)
    begins = [0.0, *ends[:-1]]
    rows = max(len(screen) for screen, _ in frames)
    parts = []
    for row in range(rows):
        lines = [screen[row] if row < len(screen) else () for screen, _ in frames]
        start = 0
        for index in range(1, len(lines) + 1):
            if index < len(lines) and lines[index] == lines[start]:
                continue
            if lines[start]:
                last = index == len(lines)
                shown = _timing(begins[start] / total, None if last else begins[index] / total)
                clock = shown.format(total=f"{total:.2f}")
                parts.append(_text(row, lines[start], clock, hidden=not last))
            start = index
    width, height = round(2 * LEFT + COLUMNS * WIDE), round(TOP + (rows + 0.6) * HIGH)
    dots = "".join(
        f'<circle cx="{LEFT + 4 + 18 * n}" cy="18" r="5" fill="{colour}"/>'
        for n, colour in enumerate(("#f87171", "#fcd34d", "#86efac"))
    )
    says = html.escape("; then ".join(COMMANDS))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" font-size="14" '
        'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace">'
        f"<title>A terminal: {says}</title>"
        f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>{dots}\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _timing(begin: float, end: float | None) -> str:
    times, values = [0.0], ["1" if begin == 0 else "0"]
    if begin > 0:
        times.append(begin)
        values.append("1")
    if end is not None:
        times.append(end)
        values.append("0")
    if len(times) == 1:
        return ""
    keys = ";".join(f"{t:.5f}".rstrip("0").rstrip(".") for t in times)
    return (
        f'<animate attributeName="opacity" calcMode="discrete" dur="{{total}}s" '
        f'repeatCount="indefinite" values="{";".join(values)}" keyTimes="{keys}"/>'
    )


def _text(row: int, line: Line, clock: str, *, hidden: bool) -> str:
    column, spans = 0, []
    for text, style in line:
        if text.strip():
            first = len(text) - len(text.lstrip())
            shown = text.strip()
            weight = ' font-weight="700"' if style.bold else ""
            spans.append(
                f'<tspan x="{LEFT + (column + first) * WIDE:.1f}" fill="{style.colour}"{weight} '
                f'textLength="{len(shown) * WIDE:.1f}" lengthAdjust="spacingAndGlyphs">'
                f"{html.escape(shown)}</tspan>"
            )
        column += len(text)
    opacity = ' opacity="0"' if hidden else ""
    y = TOP + row * HIGH + 14
    return f'<text y="{y}" xml:space="preserve"{opacity}>{clock}{"".join(spans)}</text>'


def main() -> int:
    """Record the commands and write the picture."""
    frames = record(COMMANDS)
    TARGET.write_text(draw(frames), encoding="utf-8")
    print(TARGET, f"{len(frames)} frames, {TARGET.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
