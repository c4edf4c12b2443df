"""What `svg_models` says when it cannot do what was asked: one sentence each, drawn once."""

from __future__ import annotations


class SvgModelsError(Exception):
    """Base of the errors that are meant to be read by the person who asked.

    The message is one sentence: what was expected, what came, what to do. The command line
    prints it and ends with exit code 2.
    """


class SettingError(SvgModelsError, ValueError):
    """A size, count, density, method or path that cannot be used."""


class UnknownSettingError(SettingError, TypeError):
    """A setting that does not exist, or one that was given twice."""


class ModelUnavailableError(SvgModelsError, OSError):
    """A model that could not be found, reached or read."""


class MachineError(SvgModelsError, RuntimeError):
    """A model that this machine is too small for."""


def first_line(error: BaseException) -> str:
    """Return the first line of what another library says, short enough for one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
