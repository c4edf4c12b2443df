"""Progress bars."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from svg_models.cli.output import bars_on, err, escaped, show_note

__all__ = ["Lines", "Stages", "hushed_libraries", "progress_bars"]

_BESIDE = 64  # columns of a terminal that everything but the name of a stage takes
_SOONEST = 0.05  # seconds; reports that come together after this little time tell no pace


@contextmanager
def progress_bars(*, silent: bool = False, as_json: bool = False) -> Iterator[Any]:
    """Show one bar per stage on stderr, with the time left where it can be known.

    The bars vanish at the end. Where stderr is no terminal there are plain lines in their place,
    at intervals, so that a log says how far a run is.

    Args:
        silent: neither bars, lines nor notes.
        as_json: no lines either, where a program reads.
    """
    console = err()
    console.quiet = silent
    bars = Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        # Long names are cut, not pace and time.
        TextColumn(
            "{task.description}",
            table_column=Column(
                no_wrap=True, overflow="ellipsis", max_width=max(16, console.width - _BESIDE)
            ),
        ),
        BarColumn(bar_width=20),
        CountColumn(),
        TimeElapsedColumn(),
        PaceColumn(),
        console=console,
        transient=True,
        disable=silent or not console.is_terminal,
    )
    with hushed_libraries(), bars, nullcontext() if silent else bars_on(console):
        if silent:
            warnings.showwarning = lambda *_, **__: None
        if silent or as_json or console.is_terminal:
            yield Stages(bars)
        else:
            yield Lines(lambda line: console.print(line, highlight=False, soft_wrap=True))


class CountColumn(MofNCompleteColumn):
    """Show what is done of a stage, where it counts."""

    def render(self, task: Task) -> Text:
        """Return the words beside a bar."""
        return Text("") if task.total is None else super().render(task)


class PaceColumn(ProgressColumn):
    """Show how fast a stage goes and the time that is left, from its first step on."""

    def render(self, task: Task) -> Text:
        """Return the words beside a bar."""
        elapsed = (task.finished_time if task.finished else task.elapsed) or 0.0
        words = _pace(task.description, task.completed, task.total or 0, elapsed)
        return Text(", ".join(words), style="progress.remaining")


def _pace(stage: str, done: float, total: float, elapsed: float) -> list[str]:
    """Return how fast a stage goes, where its parts are steps, and the time that is left."""
    if not total or not done or elapsed < _SOONEST:
        return []
    words = []
    if stage.endswith("sampling"):
        pace = done / elapsed
        words.append(f"{pace:.1f} steps/s" if pace >= 1 else f"{1 / pace:.1f} s/step")
    if done < total:
        left = round(elapsed / done * (total - done))
        words.append(f"{left // 60}:{left % 60:02d} left")
    return words


class _Reports:
    """What a run tells its progress to: the stage, what is done of it, and how much there is."""

    def __call__(self, stage: str, done: float, total: float) -> None:
        """Show how far a stage is."""
        raise NotImplementedError

    def named(self, name: str) -> Callable[[str, float, float], None]:
        """Return what reports the stages of one of many clips."""

        def report(stage: str, done: float, total: float) -> None:
            self(f"{escaped(name)}: {stage}", done, total)

        return report

    def another(self) -> _Reports:
        """Return what shows the stages of something that runs at the same time, beside this."""
        raise NotImplementedError

    def end(self) -> None:
        """Mark the running stage as done."""


class Lines(_Reports):
    """Print a line after the first step, then at intervals that double up to a minute.

    What does not count, such as decoding, is one line where it begins.

    Args:
        say: prints a line.
        now: reads a clock, in seconds.
    """

    FIRST, LONGEST = 5.0, 60.0  # seconds between two lines
    QUICK = ("looking for the model",)  # or else a sentence follows that says more

    def __init__(
        self, say: Callable[[str], None], *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._now = say, now
        self._stage = ""
        self._began = self._due = self._pause = 0.0

    def __call__(self, stage: str, done: float, total: float) -> None:
        """Say how far a stage is, if it is time to."""
        now = self._now()
        if stage != self._stage:
            self._stage, self._began, self._pause = stage, now, self.FIRST
            steps = stage.endswith("sampling")  # the first says how long the others will take
            self._due = now if steps else now + self._pause
            if not total and stage not in self.QUICK and ": " not in stage:  # of many clips
                self._say(stage)
        if not done or not total or now < self._due:
            return
        self._say(self._line(stage, done, total, now - self._began))
        self._due = now + self._pause
        self._pause = min(2 * self._pause, self.LONGEST)

    def another(self) -> Lines:
        """Return what prints lines of something else; see `_Reports.another`."""
        return Lines(self._say, now=self._now)

    def _line(self, stage: str, done: float, total: float, elapsed: float) -> str:
        if stage.endswith("sampling"):
            words = [f"{stage}: step {done:.0f} of {total:.0f}"]
        else:
            words = [f"{stage}: {done / total:.0%}"]
        return ", ".join(words + _pace(stage, done, total, elapsed))


class Stages(_Reports):
    """Show a bar a stage; a new stage ends the one before."""

    def __init__(self, bars: Progress) -> None:
        self._bars, self._stage = bars, ""
        self._task: TaskID | None = None

    def __call__(self, stage: str, done: float, total: float) -> None:
        """Show how far a stage is."""
        percent = stage == "loading"  # parameters; their number tells nobody anything
        if percent:
            done, total = round(100 * done / max(total, 1)), 100
        if stage != self._stage:
            self.end()
            self._stage = stage
            self._task = self._bars.add_task(stage, total=total or None, completed=int(done))
        elif self._task is not None:
            self._bars.update(self._task, completed=int(done), total=total or None)
        if self._bars.disable:
            return
        if stage == "downloading":  # the hub's client draws its own bars, with the time left
            self._bars.stop()
        elif not self._bars.live.is_started:
            self._bars.start()

    def another(self) -> Stages:
        """Return what shows bars of something else; see `_Reports.another`."""
        return Stages(self._bars)

    def end(self) -> None:
        """Mark the running stage as done."""
        if self._task is not None:
            task = self._bars.tasks[self._task]
            total = task.total or 1
            self._bars.update(self._task, total=total, completed=total)
            if task.description and not task.description.endswith(("sampling", "loading")):
                self._bars.update(self._task, visible=False)


@contextmanager
def hushed_libraries() -> Iterator[None]:
    """Keep the libraries' own bars, logs and warnings out of ours; what this package says stays."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # already while they are imported
    try:
        import diffusers.utils.logging as of_diffusers
        import transformers.utils.logging as of_transformers

        for library in (of_diffusers, of_transformers):
            library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning, module=r"svg_models\.")
            warnings.showwarning = show_note
            yield
        for library in (of_diffusers, of_transformers):
            library.enable_progress_bar()
    finally:
        logging.disable(disabled)
