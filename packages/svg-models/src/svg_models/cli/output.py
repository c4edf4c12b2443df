"""What the command says: on stdout the results, on stderr the rest, and one sentence on errors."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console

__all__ = ["err", "escaped", "out", "show_note", "spoken_errors"]

_INTERRUPTED = 130  # 128 + SIGINT, what shells expect


def out() -> Console:
    """Return the console of what was asked for."""
    return Console()


def err() -> Console:
    """Return the console of everything else."""
    return Console(stderr=True)


def _fail(sentence: str) -> NoReturn:
    err().print(f"[bold red]error:[/] {escaped(sentence)}", soft_wrap=True, highlight=False)
    raise typer.Exit(2)


def escaped(text: str) -> str:
    """Return `text` on one line, so that rich prints its brackets."""
    from rich.markup import escape

    return escape(" ".join(text.split()))


@contextmanager
def spoken_errors() -> Iterator[None]:
    """Turn what a person can mend into one sentence and exit code 2."""
    try:
        from svg_attention import UnsupportedError
    except ImportError as error:  # as where flash_kmeans is another project's
        _fail(str(error))
    from svg_models.errors import SvgModelsError

    try:
        with _terminated_like_interrupted():
            yield
    except SvgModelsError as error:
        _fail(str(error))
    except UnsupportedError as error:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in error.reasons.items())
        _fail(f"this backend cannot run here ({reasons}); leave --backend out to use what can")
    except KeyboardInterrupt:
        err().print("[yellow]stopped:[/] nothing was written", highlight=False)
        raise typer.Exit(_INTERRUPTED) from None


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM, which `timeout` and schedulers send, clean up as Ctrl-C does."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def show_note(message: Any, *_: Any, **__: Any) -> None:
    """Print a warning of this package as a note, in the place of `warnings.showwarning`."""
    err().print(f"[yellow]note:[/] {escaped(str(message))}", soft_wrap=True, highlight=False)
