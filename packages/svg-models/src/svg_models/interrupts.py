"""What Ctrl-C and SIGTERM do to the command: out at once, or first clean up, never a traceback.

Imported before anything that takes time, so it imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

__all__ = ["STATUS", "Interrupts", "listening", "unwinding"]

STATUS = 130  # 128 + SIGINT, what shells expect
_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # `timeout` and schedulers send the second
_SHOW_CURSOR = "\x1b[?25h"


class Interrupts:
    """Answer the signals of one command.

    Attributes:
        received: whether one came.
        unwinds: whether the first one is raised as KeyboardInterrupt, so that temporary files and
            child processes are cleaned up; else, and at the second, the process ends at once.
        says: what to say of the run so far, in place of whether one file was written.
    """

    def __init__(self) -> None:
        self.received = False
        self.unwinds = False
        self.says = ""
        self._watched: Path | None = None
        self._before: object = None

    def watch(self, path: Path) -> None:
        """Remember what stands under `path`, so that `sentence` can tell whether it was written."""
        self._watched, self._before = path, _identity(path)

    def sentence(self) -> str:
        """Say what became of the file."""
        if self.says:
            return f"stopped: {self.says}"
        if self._watched is None or _identity(self._watched) == self._before:
            return "stopped: nothing was written"
        return f"stopped: {ascii(str(self._watched))[1:-1]} was written"

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        first, self.received = not self.received, True
        if first and self.unwinds:
            raise KeyboardInterrupt
        self.leave()

    def leave(self) -> NoReturn:
        """End the process without a word more; what it leaves is swept by the next one."""
        cursor = _SHOW_CURSOR if sys.__stderr__ is not None and sys.__stderr__.isatty() else ""
        with contextlib.suppress(OSError):
            os.write(2, f"{cursor}{self.sentence()}\n".encode("ascii", "replace"))
        os._exit(STATUS)

    def unraisable(self, fault: Any) -> None:
        """End the process where an interrupt came into code that cannot raise, as `__del__`."""
        if issubclass(fault.exc_type, KeyboardInterrupt):
            self.leave()
        sys.__unraisablehook__(fault)


@contextlib.contextmanager
def listening() -> Iterator[Interrupts]:
    """Answer signals by a new `Interrupts`, or by the one that already does."""
    if threading.current_thread() is not threading.main_thread():
        yield Interrupts()  # signals are handled on the main thread alone
        return
    present = signal.getsignal(signal.SIGINT)
    if isinstance(present, Interrupts):
        yield present
        return
    answer = Interrupts()
    before = [signal.signal(number, answer) for number in _SIGNALS]
    hook, sys.unraisablehook = sys.unraisablehook, answer.unraisable
    try:
        yield answer
    finally:
        sys.unraisablehook = hook
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def unwinding(path: Path) -> Iterator[Interrupts]:
    """Clean up at an interrupt while `path` is being made, instead of ending at once."""
    with listening() as answer:
        answer.watch(path)
        answer.unwinds = True
        try:
            yield answer
        finally:
            answer.unwinds = False


def _identity(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
