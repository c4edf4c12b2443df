"""Methods decide which keys each query reads; they meet the backends only in the plan."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from svg_attention.methods.base import Method
from svg_attention.methods.call import Arrivals, HeadShare
from svg_attention.methods.dense import Dense
from svg_attention.methods.random_blocks import RandomBlocks
from svg_attention.methods.svg1 import SVG1
from svg_attention.methods.svg2 import SVG2, cluster_counts
from svg_attention.methods.svg_ear import SVGEAR

METHODS: dict[str, type[Method]] = {
    method.__name__: method for method in (Dense, SVG1, SVG2, SVGEAR, RandomBlocks)
}


def method_from_dict(values: Mapping[str, Any]) -> Method:
    """Build the method that `to_dict` described.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if no method has that name, or a setting is unknown or out of range.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"a method is described by a mapping, got {values!r}")
    name = values.get("name")
    if not isinstance(name, str) or name not in METHODS:
        alike = [known for known in METHODS if known.lower() == str(name).lower()]
        near = alike or difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(METHODS)}"
        raise ValueError(f"unknown method {name!r}; {hint}")
    return METHODS[name].from_dict(values)


__all__ = [
    "Arrivals",
    "METHODS",
    "SVG1",
    "SVG2",
    "SVGEAR",
    "Dense",
    "HeadShare",
    "Method",
    "RandomBlocks",
    "cluster_counts",
    "method_from_dict",
]
