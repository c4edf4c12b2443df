"""What `svg_models` says when it cannot do what was asked: one sentence each, drawn once."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "LostRankError",
    "MachineError",
    "ModelUnavailableError",
    "OutputError",
    "SettingError",
    "SvgModelsError",
    "about_memory",
    "first_line",
    "foreign_faults",
    "printable",
]

_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, bidirectional marks, lone surrogates, breaks
_JOINERS = "\u200c\u200d"  # between letters of several scripts, and inside emoji
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # either name; all know the first
_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LONGEST = 600  # characters; what came may be a megabyte


class SvgModelsError(Exception):
    """Base of the errors that are meant to be read by the person who asked.

    The message is one sentence: what was expected, what came, what to do. The command line
    prints it and ends with exit code 2. Control characters that came with a name or from a file
    are written out in it.
    """

    def __str__(self) -> str:
        return shortened(printable(super().__str__()), _LONGEST)


class SettingError(SvgModelsError, ValueError):
    """A size, count, density, method or path that cannot be used."""


class UnknownSettingError(SettingError, TypeError):
    """A setting that does not exist, or one that was given twice."""


class ModelUnavailableError(SvgModelsError, OSError):
    """A model that could not be found, reached or read."""


class MachineError(SvgModelsError, RuntimeError):
    """A model or a clip that this machine is too small for."""


class LostRankError(MachineError):
    """A process of several that work together is gone; the sentence says which and how."""


class OutputError(SvgModelsError, OSError):
    """A file that could not be written; if it was a clip, the sentence says where it is kept."""


def printable(text: str) -> str:
    r"""Return `text` with every character that a terminal might obey written out, as in `\x1b`."""
    return "".join(
        character if _harmless(character) else character.encode("unicode_escape").decode()
        for character in text
    )


def _harmless(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) not in _OBEYED


def shortened(text: str, most: int) -> str:
    """Return `text` with its middle left out where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[:half]} … {text[-half:]}"


def first_line(error: BaseException) -> str:
    """Return the first line of what another library says, short enough for one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def about_memory(error: BaseException) -> str:
    """Return what torch says of memory that was not enough, and whether it was in pieces.

    Torch keeps what tensors gave back. Of a GPU on which half as much is kept as was asked for in
    vain, or more, memory was hardly missing, but a piece of it that is large enough; blocks that
    grow have no such pieces.
    """
    text = " ".join(str(error).split())
    asked = re.search(r"Tried to allocate ([\d.]+) ([KMG])iB", text)
    kept = re.search(r"([\d.]+) ([KMG])iB is reserved by PyTorch but unallocated", text)
    told = first_line(error)
    if asked is None or kept is None or any(name in os.environ for name in _ALLOCATOR):
        return told
    wanted, spare = (float(found[1]) * _BINARY[found[2]] for found in (asked, kept))
    if 2 * spare < wanted:
        return told
    return f"{told}; {kept[0]}, so set {_ALLOCATOR[0]}=expandable_segments:True and try again"


@contextmanager
def foreign_faults(sentence: str, kind: type[SvgModelsError]) -> Iterator[None]:
    """Turn whatever another library raises over a stranger's file into one sentence.

    Decoders and model loaders raise some thirty types over a malformed file, plain `Exception`
    and panics of Rust code among them; which ones is no part of their interface.

    Args:
        sentence: what could not be done.
        kind: the error to raise.

    Raises:
        SvgModelsError: of that kind; errors of this package pass as they are.
    """
    try:
        yield
    except SvgModelsError:
        raise
    except Exception as error:
        raise kind(f"{sentence} ({type(error).__name__}: {first_line(error)})") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust code: no Exception, and no name
            raise
        raise kind(f"{sentence} ({first_line(error)})") from error
