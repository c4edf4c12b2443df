"""JSON as its standard has it: every name of an object once, numbers that are numbers."""

from __future__ import annotations

import json
from typing import Any

from svg_models.errors import shortened

__all__ = ["parse_json"]


def parse_json(text: str) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: if it is no JSON, an object has a name twice, of which Python's own reader would
            take the last, or a number is NaN or infinite.
        RecursionError: if it nests deeper than Python can follow.
    """
    return json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_constant)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shortened(ascii(twice), 80)} stands there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
