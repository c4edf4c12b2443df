"""What the processes of `test_launch` do; they import this file and nothing heavy."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svg_models.errors import ModelUnavailableError, SettingError
from svg_models.generation.request import GenerateRequest
from svg_models.launch import Group, Place, Rank

TWO = tuple(
    Place(name=f"the process of GPU {number}", environment={"SEEN": str(number)})
    for number in (5, 6)
)


class Odd(Exception):
    """An error that cannot be pickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def work(rank: Rank) -> Callable[[dict[int, str]], Any]:
    """Return what does to each rank what the task says by its number."""

    def do(task: dict[int, str]) -> Any:
        rank.report("sampling", 3, 10)
        act(task.get(rank.number, "answer"))
        return os.getpid(), os.environ["SEEN"], rank.number, rank.size

    return do


def clips(rank: Rank) -> Callable[[GenerateRequest], Any]:
    """Return what stands for a clip: who made it; a prompt may say what happens instead."""

    def make(request: GenerateRequest) -> Any:
        what, _, once = (request.prompt or "").partition(" once ")
        if once:
            try:
                Path(once).touch(exist_ok=False)
            except FileExistsError:
                what = "answer"
        act(what)
        return os.environ["SEEN"], os.getpid(), rank.size

    return make


def act(what: str) -> None:
    name, _, value = what.partition(" ")
    if name == "signal":
        os.kill(os.getpid(), signal.Signals[value])
    elif name == "exit":
        print("half a line", file=sys.stderr)
        print("the GPU has fallen off the bus", file=sys.stderr, flush=True)
        os._exit(int(value))
    elif name == "wait":
        time.sleep(float(value))
    elif name == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    elif name == "absent":
        raise ModelUnavailableError(f"no model {value}")
    elif name == "refuse":
        raise SettingError(f"refused {value}")
    elif name == "full":
        raise OSError(28, "No space left on device", "/cache/kernel.so")
    elif name == "odd":
        raise Odd("one", "two")
    elif name == "break":
        raise ZeroDivisionError(value)
    elif name == "note":
        warnings.warn_explicit(value, UserWarning, "sample.py", 1, module="svg_models.generation")
        warnings.warn("of a library", UserWarning, stacklevel=1)


def main() -> None:
    """Wait in all ranks as a command does, until a signal comes."""
    from svg_models.interrupts import unwinding

    marker, what = Path(sys.argv[1]), sys.argv[2]
    with unwinding(marker.with_name("clip.mp4")) as answer:
        try:
            with Group(TWO, work) as group:
                group.run({0: what, 1: what}, lambda *_: marker.touch())
        except KeyboardInterrupt:
            print(answer.sentence(), file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()
