"""Numbers from outside: of a command line, of JSON, of NumPy."""

from __future__ import annotations

import math
import operator
from typing import Any

from svg_models.errors import SettingError, shortened

__all__ = ["as_number", "as_whole", "written"]


def as_number(name: str, value: Any) -> float:
    """Return a finite number as a float, that of NumPy or torch too.

    Raises:
        SettingError: if it is no number; True and "0.5" are none.
    """
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise SettingError(f"{name} must be a number, got {written(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise SettingError(f"{name} must be a finite number, got {written(value)}") from error
    if not math.isfinite(number):
        raise SettingError(f"{name} must be a finite number, got {number}")
    return number


def as_whole(name: str, value: Any) -> int:
    """Return a whole number as an int, that of NumPy or torch too.

    Raises:
        SettingError: if it is no whole number; 2.5, 3.0, True and "3" are none.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, RuntimeError):
        raise SettingError(f"{name} must be a whole number, got {written(value)}") from None


def written(value: Any) -> str:
    """Return a value as it is typed, with the middle left out where it is very long."""
    try:
        return shortened(repr(value), 60)
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of thousands of digits"
