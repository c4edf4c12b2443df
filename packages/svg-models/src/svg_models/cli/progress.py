"""Progress bars."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from rich.text import Text

from svg_models.cli.output import err, escaped, show_note

__all__ = ["Stages", "hushed_libraries", "progress_bars"]


@contextmanager
def progress_bars(*, silent: bool = False) -> Iterator[Any]:
    """Show one bar per stage on stderr, with the time left where it can be known.

    The bars vanish at the end. Where stderr is no terminal there are none, only a line per clip.

    Args:
        silent: neither bars nor notes.
    """
    console = err()
    console.quiet = silent
    bars = Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        PaceColumn(),
        console=console,
        transient=True,
        disable=silent or not console.is_terminal,
    )
    with hushed_libraries(), bars:
        if silent:
            warnings.showwarning = lambda *_, **__: None
        yield Stages(bars)


class PaceColumn(ProgressColumn):
    """Show how fast a stage goes and the time that is left, from its first step on."""

    def render(self, task: Task) -> Text:
        """Return the words beside a bar."""
        elapsed = task.finished_time if task.finished else task.elapsed
        if not task.total or not task.completed or not elapsed:
            return Text("")
        words = []
        if task.description.endswith("sampling"):
            pace = task.completed / elapsed
            words.append(f"{pace:.1f} steps/s" if pace >= 1 else f"{1 / pace:.1f} s/step")
        if not task.finished:
            left = round(elapsed / task.completed * (task.total - task.completed))
            words.append(f"{left // 60}:{left % 60:02d} left")
        return Text(", ".join(words), style="progress.remaining")


class Stages:
    """Called as `(stage, done, total)`; a new stage ends the one before."""

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
            if self._bars.disable and stage.endswith(": sampling"):
                self._bars.console.print(stage.removesuffix(": sampling"), highlight=False)
            self._task = self._bars.add_task(stage, total=total or None, completed=int(done))
        elif self._task is not None:
            self._bars.update(self._task, completed=int(done), total=total or None)
        if self._bars.disable:
            return
        if stage == "downloading":  # the hub's client draws its own bars, with the time left
            self._bars.stop()
        elif not self._bars.live.is_started:
            self._bars.start()

    def named(self, name: str) -> Callable[[str, float, float], None]:
        """Return what reports the stages of one of many clips."""

        def report(stage: str, done: float, total: float) -> None:
            self(f"{escaped(name)}: {stage}", done, total)

        return report

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
