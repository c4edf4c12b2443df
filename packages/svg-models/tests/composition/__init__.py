"""Features of diffusers together with a sparse run, family by family.

Used by the tests, which run the quick cells, and by `tools/composition_matrix.py`, which runs all
of them and writes the table of the documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from composition.cells import Cell, check, check_graphs, check_model_offload, ulysses_cells
from composition.features import BLOCKS, FEATURES, WHOLE, Feature, caching
from composition.player import CASES, Player, recorded

__all__ = [
    "CASES",
    "QUICK",
    "SLOW",
    "ULYSSES",
    "Cell",
    "Feature",
    "Player",
    "caching",
    "check",
    "recorded",
    "ulysses_cells",
]

QUICK: dict[str, Callable[[str], Cell]] = {
    "Model CPU offload": check_model_offload,
    **{feature.title: partial(check, feature=feature) for feature in FEATURES},
}
"""Rows of the table that take about a second for each family."""
SLOW: dict[str, Callable[[str], Cell]] = {
    BLOCKS.title: check_graphs,
    WHOLE.title: partial(check, feature=WHOLE),
}
"""Rows that take the compiler some ten seconds for each family."""
ULYSSES = "Ulysses context parallelism"
"""The row that two processes fill for all families at once."""
