"""Names that people type: other spellings of them, and the nearest to one that is unknown."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from svg_models.errors import UnknownSettingError

__all__ = ["DIFFUSERS_NAMES", "check_names", "checks_names", "did_you_mean", "respell"]

P = ParamSpec("P")
R = TypeVar("R")

DIFFUSERS_NAMES: dict[str, str] = {
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
}
"""What the call of a diffusers pipeline calls a setting -> what this package calls it."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return "; did you mean 'steps'?" for the choice nearest to `word`, empty if none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def respell(given: Mapping[str, Any], spellings: Mapping[str, str]) -> dict[str, Any]:
    """Return arguments under the names that this package uses.

    Raises:
        UnknownSettingError: if one is given under both of its names.
    """
    settings: dict[str, Any] = {}
    for name, value in given.items():
        own = spellings.get(name, name)
        if own in settings or (own != name and own in given):
            raise UnknownSettingError(f"{own} and {name} are the same setting; give one of them")
        settings[own] = value
    return settings


def check_names(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names of arguments that a function does not have.

    Raises:
        UnknownSettingError: names the first, and the nearest that is known.
    """
    names = list(known)
    for name in given:
        if name not in names:
            raise UnknownSettingError(
                f"{function} has no setting '{name}'{did_you_mean(name, names)}; "
                f"known are {', '.join(names)}"
            )


def checks_names(
    spellings: Mapping[str, str] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function understand other spellings and name the nearest to an unknown argument."""

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        known = list(inspect.signature(function).parameters)
        also = dict(spellings or {})

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            settings = respell(kwargs, also)
            check_names(function.__name__, settings, [*known, *also])
            return function(*args, **settings)

        return checked

    return wrap
