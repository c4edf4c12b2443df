"""What the command says: on stdout the results, on stderr the rest, and one sentence on errors."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from svg_models.errors import SvgModelsError, about_memory, first_line, printable, shortened
from svg_models.interrupts import STATUS, Interrupts, listening

__all__ = [
    "PlainCommand",
    "SpokenGroup",
    "bars_on",
    "err",
    "escaped",
    "out",
    "say_json",
    "say_path",
    "show_note",
    "spoken_errors",
]

_LONGEST = 600  # characters of an error; what was typed may be a megabyte


def out() -> Console:
    """Return the console of what was asked for."""
    return Console()


def say_json(values: Any) -> None:
    """Print plain values for a program; what JSON does not know is null."""
    json.dump(values, sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")


_shown: list[Console] = []  # that of the bars, while there are some


def err() -> Console:
    """Return the console of everything else; lines on it come to stand above the bars."""
    return _shown[-1] if _shown else Console(stderr=True)


@contextlib.contextmanager
def bars_on(console: Console) -> Iterator[None]:
    """Say everything through the console that draws bars, so that neither cuts the other."""
    _shown.append(console)
    try:
        yield
    finally:
        _shown.remove(console)


def escaped(text: str) -> str:
    """Return `text` on one line, so that rich prints its brackets and a terminal obeys nothing.

    Whatever a person, a file or a library has worded goes through here.
    """
    return escape(printable(" ".join(text.split())))


def say_path(path: Path, label: str = "") -> None:
    """Print where a result is, alone on its line of stdout."""
    out().print(f"{label}{escaped(str(path))}", soft_wrap=True, highlight=False)


def _fail(sentence: str) -> NoReturn:
    _say(f"[bold red]error:[/] {escaped(shortened(sentence, _LONGEST))}")
    raise typer.Exit(2)


class PlainCommand(TyperCommand):
    """A command whose help says what a value is only where that says something."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help; see `click.Command.format_help`."""
        _leave_types_out(self.get_params(ctx))
        super().format_help(ctx, formatter)


def _leave_types_out(parameters: Sequence[Any]) -> None:
    for parameter in parameters:
        if parameter.param_type_name == "option" and parameter.metavar is None:
            parameter.metavar = " "
        elif hasattr(parameter, "display_type_rich"):  # of typer, for arguments
            parameter.display_type_rich = lambda *_, **__: None


class SpokenGroup(TyperGroup):
    """A group of commands whose usage errors are one sentence, as all others are."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help; see `click.Command.format_help`."""
        _leave_types_out(self.get_params(ctx))
        super().format_help(ctx, formatter)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; see `click.Group.main`."""
        run = functools.partial(
            super().main,
            args,
            prog_name,
            complete_var,
            standalone_mode=False,
            windows_expand_args=windows_expand_args,
            **extra,
        )
        if not standalone_mode:
            return run()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal without Unicode is no reason to fail
                stream.reconfigure(errors="backslashreplace")
        with listening() as interrupts:
            sys.exit(_status(run, interrupts))


def _status(run: Callable[[], Any], interrupts: Interrupts) -> int:
    try:
        result = run()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return _stopped(interrupts)
    except Exception as error:  # noqa: BLE001 - nothing passes the last boundary unsaid
        if interrupts.received:  # came into a module that was being imported, for example
            return _stopped(interrupts)
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads any more
            return 1
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return 2
        if isinstance(error, SvgModelsError):  # while options were read
            with contextlib.suppress(typer.Exit):
                _fail(str(error))
            return 2
        if hasattr(error, "format_message"):  # of click, or of typer's copy of it
            with contextlib.suppress(typer.Exit):
                _fail(error.format_message())
            return 2
        return _own_fault(error)


def _stopped(interrupts: Interrupts) -> int:
    _say(f"[yellow]{escape(interrupts.sentence())}[/]")
    return STATUS


def _own_fault(error: Exception) -> int:
    """Say that something went wrong which nobody thought of, and keep the traceback in a file."""
    text = "".join(traceback.format_exception(error))
    try:
        handle, name = tempfile.mkstemp(prefix="svg-fault-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        where = f"the traceback is in {name}; please report it"
    except OSError:
        where = printable(text)
    sentence = f"a fault of svg itself ({type(error).__name__}: {first_line(error)}); {where}"
    _say(f"[bold red]error:[/] {escaped(sentence)}")
    return 1


@contextlib.contextmanager
def spoken_errors() -> Iterator[None]:
    """Turn what a person can mend into one sentence and exit code 2."""
    with listening() as interrupts:
        try:
            yield
        except SvgModelsError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            raise typer.Exit(_stopped(interrupts)) from None
        except Exception as error:
            if interrupts.received:
                raise typer.Exit(_stopped(interrupts)) from None
            if isinstance(error, ImportError):  # as where flash_kmeans is another project's
                _fail(str(error))
            if reasons := getattr(error, "reasons", None):  # UnsupportedError of svg_attention
                listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
                asked = next((n for n in ("linears", "attention") if n in reasons), "backend")
                _fail(f"this cannot run here ({listed}); leave --{asked} out to use what can")
            if _out_of_memory(error):
                _fail(
                    f"the memory was not enough ({about_memory(error)}); take fewer --frames, a "
                    "smaller --size, or --offload on a GPU"
                )
            raise


def _out_of_memory(error: Exception) -> bool:
    # torch has no class of its own for the CPU's allocator
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def show_note(message: Any, *_: Any, **__: Any) -> None:
    """Print a warning of this package as a note, in the place of `warnings.showwarning`."""
    _say(f"[yellow]note:[/] {escaped(str(message))}")


def _say(sentence: str) -> None:
    """Print a sentence on stderr: one line in a log, whole words on the lines of a terminal."""
    console = err()
    console.print(sentence, soft_wrap=not console.is_terminal, highlight=False)
