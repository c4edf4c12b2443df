"""Checks of configuration values: each of the right type, in range, and fit for JSON."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch


def integer(name: str, value: Any, *, least: int) -> int:
    """Return `value` as an int of at least `least`; NumPy's integers are converted.

    Raises:
        TypeError: if it is no integer (2.0 and True are none).
        ValueError: if it is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def fraction(name: str, value: Any, *, zero: bool = False) -> float:
    """Return `value` as a float in (0, 1], or in [0, 1] where it may be `zero`.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range or not a number in the sense of IEEE 754.
    """
    number = _number(name, value)
    if not (0.0 < number <= 1.0 or (zero and number == 0.0)):
        raise ValueError(f"{name} must lie in {'[' if zero else '('}0, 1], got {value}")
    return number


def positive(name: str, value: Any) -> float:
    """Return `value` as a float above zero.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is zero, negative, infinite or not a number in the sense of IEEE 754.
    """
    number = _number(name, value)
    if not (0.0 < number < math.inf):
        raise ValueError(f"{name} must be above 0 and finite, got {value}")
    return number


def _number(name: str, value: Any) -> float:
    """Return `value` as a float; infinite if it is an integer that is out of the range of one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def flag(name: str, value: Any) -> bool:
    """Return `value` as a bool; NumPy's are converted.

    Raises:
        TypeError: if it is no bool ("no" and 0 are none).
    """
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")


def choice(name: str, value: Any, options: Iterable[str]) -> str:
    """Return `value` if it is one of `options`.

    Raises:
        ValueError: if it is not.
    """
    known = tuple(options)
    if not isinstance(value, str) or value not in known:
        listed = " or ".join(repr(option) for option in known)
        raise ValueError(f"{name} must be {listed}, got {value!r}")
    return str(value)


def tensor(name: str, value: Any) -> torch.Tensor:
    """Return `value` if it is a tensor.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def settings(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` as keyword arguments of a configuration dataclass.

    Raises:
        ValueError: if a key names no field; it offers the nearest one.
    """
    known = [entry.name for entry in fields(config)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}"
            raise ValueError(f"{config.__name__} has no setting {key!r}; {hint}")
    return dict(values)


def assign(config: object, **values: Any) -> None:
    """Store checked values in a frozen dataclass that is being constructed."""
    for name, value in values.items():
        object.__setattr__(config, name, value)
