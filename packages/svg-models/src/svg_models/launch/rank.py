"""The side of a process that was started: it does what it is sent, and says what became of it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from svg_models.errors import first_line

__all__ = ["Rank", "Work", "serve"]

Work = Callable[["Rank"], Callable[[Any], Any]]
"""Called once in each process; what it returns is called with each task."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One of the processes that work together.

    Attributes:
        number: from 0.
        size: how many there are.
        store_port: of the `TCPStore` on this machine where they meet; 0 if there is only one.
        send: says something to the process that started this one.
        terminal: descriptor of the terminal's standard error, while that of this process is kept
            for the sentence about its end.
    """

    number: int
    size: int
    store_port: int
    send: Callable[[str, Any], None]
    terminal: int

    def report(self, stage: str, done: float, total: float) -> None:
        """Tell how far this one is; what the others would say is the same."""
        if self.number == 0:
            if stage == "downloading":  # the hub's client draws its own bars
                os.dup2(self.terminal, 2)
            self.send("progress", (stage, done, total))


def serve(number: int, size: int, pipe: Connection, words: Connection, work: Work) -> NoReturn:
    """Do what comes through a pipe until the process that sends it is gone.

    Args:
        number: of this rank.
        size: how many ranks there are.
        pipe: tasks come here and answers leave.
        words: takes the standard output and error of this process.
        work: what to do.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever started this one decides, at once
    threading.Thread(target=_end_with_parent, daemon=True).start()
    terminal = os.dup(2)
    for stream in (1, 2):
        os.dup2(words.fileno(), stream)

    def send(kind: str, value: Any) -> None:
        # Not `pipe.send`: torch would share the memory of tensors with a process that may be gone.
        pipe.send_bytes(pickle.dumps((kind, value)))

    def note(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        if number == 0:
            send("note", str(message))

    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=r"svg_models\.")
    warnings.showwarning = note
    try:
        send("begun", None)
        store_port = pickle.loads(pipe.recv_bytes())
        rank = Rank(number=number, size=size, store_port=store_port, send=send, terminal=terminal)
        answer: Callable[[Any], Any] | None = None
        while True:
            task = pickle.loads(pipe.recv_bytes())
            try:
                answer = answer or work(rank)
                send("done", answer(task))
            except Exception as error:  # noqa: BLE001 - raised where the task came from
                send("failed", (_portable(error), traceback.format_exc()))
    except (EOFError, ConnectionError):  # nobody is there to work for
        os._exit(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent, itself if possible."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - errors of any library, some of which cannot be pickled
        return RuntimeError(f"{type(error).__name__}: {first_line(error)}")
    return error
