"""The side of the process that starts others: it sends tasks, watches, and ends them."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from svg_models.errors import LostRankError, OutputError, SvgModelsError, printable, shortened
from svg_models.launch.rank import Work, serve

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

__all__ = ["Finished", "Group", "Place", "finished"]

_PATIENCE = 1.0  # seconds for the other ranks to tell what became of them
_FAREWELL = 3.0  # seconds from SIGTERM to SIGKILL
_LAST_WORDS = 4096  # bytes

Report = Callable[[str, float, float], None]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one process runs.

    Attributes:
        name: what people call the process, such as "the process of GPU 1".
        environment: variables that it is started with.
    """

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What became of a task.

    Attributes:
        value: what rank 0 returned.
        error: what was raised instead, `LostRankError` if a process is gone.
    """

    value: Any = None
    error: Exception | None = None


class RankTraceback(Exception):
    """The cause of an error that was raised in another process: its traceback there."""


@dataclass
class _Member:
    number: int
    place: Place
    process: SpawnProcess
    pipe: Connection
    words: Connection
    begun: bool = False
    last_words: bytes = b""
    answer: Finished | None = None
    ended: bool = False

    @property
    def lost(self) -> bool:
        """Return whether it is gone and owes an answer."""
        return self.ended and self.answer is None

    def listen(self) -> None:
        """Keep the end of what the process wrote to its standard output and error."""
        while self.words.poll():
            read = os.read(self.words.fileno(), 1 << 16)
            if not read:
                break
            self.last_words = (self.last_words + read)[-_LAST_WORDS:]


class Group:
    """Processes of this machine that do each task together.

    They start with the first task and stay for the next one. Whoever has started them closes them;
    `with` does. They end with this process however it ends.

    Args:
        places: one for each rank.
        work: what they do, a function of a module, see `rank.Work`.

    Attributes:
        stage: what the present task is at, in words.
        busy: whether there is a task that `take` has not returned yet.
    """

    def __init__(self, places: Sequence[Place], work: Work) -> None:
        self._places, self._work = tuple(places), work
        self._members: list[_Member] = []
        self._store: Any = None
        self._report: Report | None = None
        self._trouble = 0.0
        self.stage, self.busy = "starting", False

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def send(self, task: Any, report: Report) -> None:
        """Give all ranks a task; `finished` tells when it is done.

        Args:
            task: can be pickled.
            report: called with what rank 0 reports.
        """
        if not self._members:
            self.stage = "starting"
            self._start()
        for member in self._members:
            member.answer = None
        self._report, self._trouble, self.busy = report, 0.0, True
        self._tell(task)

    def run(self, task: Any, report: Report) -> Any:
        """Do one task.

        Raises:
            LostRankError: if a process is gone; the sentence says which, how, and what to do.
            Exception: what was raised in a process, its traceback there as the cause.
        """
        self.send(task, report)
        ((_, result),) = finished([self])
        if result.error is not None:
            raise result.error
        return result.value

    def close(self) -> None:
        """End all processes, and wait until they are gone."""
        members, self._members, self._store = self._members, [], None
        for member in members:
            member.process.terminate()
        deadline = time.monotonic() + _FAREWELL
        for member in members:
            member.process.join(max(0.0, deadline - time.monotonic()))
            member.process.kill()
            member.process.join()
            for end in (member.pipe, member.words):
                end.close()
            member.process.close()

    @property
    def size(self) -> int:
        """Return how many processes there are."""
        return len(self._places)

    @property
    def patience(self) -> float | None:
        """Return the seconds after which `take` has a result whatever comes; None without end."""
        return max(0.0, self._trouble - time.monotonic()) if self._trouble else None

    def awaited(self) -> list[Any]:
        """Return what `multiprocessing.connection.wait` can wait for."""
        return [
            thing
            for member in self._members
            if not member.ended
            for thing in (member.pipe, member.words, member.process.sentinel)
        ]

    def take(self) -> Finished | None:
        """Hear what the processes have to say; return what became of the task, once it is known."""
        for member in self._members:
            self._hear(member)
        answers = [member.answer for member in self._members]
        lost = [member for member in self._members if member.lost]
        faults = [a.error for a in answers if a is not None and a.error is not None]
        if not lost and not faults:
            self.busy = None in answers
            return None if self.busy else answers[0]
        self._trouble = self._trouble or time.monotonic() + _PATIENCE
        if None in answers and time.monotonic() < self._trouble:
            return None
        # A process that is gone is the reason why others could not go on.
        error = self._obituary(lost[0]) if lost else _plainest(faults)
        if lost or None in answers:  # else all of them wait for the next task
            self.close()
        self.busy = False
        return Finished(error=error)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # Started below it would unblock the signal. It says only what is meant: that it removes the
        # semaphores of processes that were ended.
        with _environment({"PYTHONWARNINGS": "ignore"}):
            resource_tracker.ensure_running()
        size = len(self._places)
        with _without_interrupts():
            for number, place in enumerate(self._places):
                ours, theirs = context.Pipe()
                words, voice = context.Pipe(duplex=False)
                process = context.Process(
                    target=serve,
                    args=(number, size, theirs, voice, self._work),
                    name=f"svg-rank-{number}",
                    daemon=True,
                )
                with _environment(place.environment):
                    process.start()
                theirs.close()
                voice.close()
                self._members.append(
                    _Member(number=number, place=place, process=process, pipe=ours, words=words)
                )
        if size > 1:
            from torch.distributed import TCPStore

            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._tell(0 if self._store is None else self._store.port)

    def _tell(self, message: Any) -> None:
        data = pickle.dumps(message)
        for member in self._members:
            with contextlib.suppress(OSError):  # gone, as `take` will see
                member.pipe.send_bytes(data)

    def _hear(self, member: _Member) -> None:
        member.ended = not member.process.is_alive()  # asked before its last message is read
        member.listen()
        with contextlib.suppress(EOFError, OSError):
            while member.pipe.poll():
                kind, value = pickle.loads(member.pipe.recv_bytes())
                self._heed(member, kind, value)

    def _heed(self, member: _Member, kind: str, value: Any) -> None:
        if kind == "begun":
            member.begun = True
        elif kind == "progress":
            stage, done, total = value
            self.stage = f"{stage}, {done:.0f} of {total:.0f}" if stage == "sampling" else stage
            if self._report is not None:
                self._report(*value)
        elif kind == "note":
            warnings.warn(value, UserWarning, stacklevel=1)
        elif kind == "done":
            member.answer = Finished(value=value)
        else:
            error, trace = value
            error.__cause__ = RankTraceback(f"\n{trace}")
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                error = OutputError(
                    f"{member.place.name} cannot write {error.filename or 'a file'} (no space left "
                    "on device); make room there and run it again"
                )
            member.answer = Finished(error=error)

    def _obituary(self, member: _Member) -> LostRankError:
        """Return the sentence about a process that is gone."""
        member.process.join()
        code, size = member.process.exitcode or 0, len(self._members)
        member.listen()
        who = f"{member.place.name} (rank {member.number} of {size})"
        if not member.begun and code == 1:
            return LostRankError(
                f"{who} ended before it began; in a script, what starts processes "
                "belongs under `if __name__ == '__main__':`, since each reads the script anew"
            )
        how = f"ended with exit code {code}"
        what = "run it again, or on fewer GPUs"
        if code < 0:
            how = f"was ended by {_signal_name(-code)}"
        if code == -signal.SIGKILL:
            what = (
                "the system does so when memory runs out, which each process takes for its own "
                "copy of the model; free some, or use fewer GPUs"
            )
        lines = member.last_words.decode(errors="replace").strip().splitlines()
        last = ""
        if lines and -code not in (signal.SIGKILL, signal.SIGTERM):  # it did not know of its end
            last = f', saying "{shortened(printable(lines[-1].strip()), 200)}"'
        return LostRankError(f"{who} {how} while {self.stage}{last}: {what}")


def finished(groups: Sequence[Group]) -> Iterator[tuple[Group, Finished]]:
    """Wait for the tasks of groups.

    Args:
        groups: those that are busy are waited for, also with a task that they are given meanwhile.

    Yields:
        A group and what became of its task, as soon as that is known.
    """
    while busy := [group for group in groups if group.busy]:
        limits = [group.patience for group in busy if group.patience is not None]
        wait([thing for group in busy for thing in group.awaited()], min(limits, default=None))
        for group in busy:
            result = group.take()
            if result is not None:
                yield group, result


def _plainest(faults: Sequence[Exception]) -> Exception:
    """Return the error that a person can mend, or else the first one."""
    worded = [e for e in faults if isinstance(e, SvgModelsError) or hasattr(e, "reasons")]
    return (worded or faults)[0]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: a terminal sends it to all of a command."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
