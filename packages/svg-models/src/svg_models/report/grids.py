"""Tables of density and time by step and layer from the log of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from svg_attention import CallRecord


@dataclass(frozen=True, kw_only=True, eq=False)
class Grids:
    """What attention did, by denoising step (rows) and layer (columns).

    Attributes:
        density: `[steps, layers]`, mean over guidance branches; NaN where nothing ran.
        seconds: `[steps, layers]`, summed over guidance branches; None if nothing was timed.
        dense: `[steps, layers]`, True where the schedule kept the call dense.
    """

    density: np.ndarray
    seconds: np.ndarray | None
    dense: np.ndarray

    @property
    def has_sparse_calls(self) -> bool:
        """Whether any call was planned by a sparse method."""
        return bool((~self.dense & np.isfinite(self.density)).any())


def grids(records: Iterable[CallRecord]) -> Grids | None:
    """Tabulate a run's calls.

    Args:
        records: what `RunStats.records` holds; calls whose step is unknown are left out.

    Returns:
        The tables, or None if no call has a known step.
    """
    known = [(r, r.step) for r in records if r.step is not None]
    if not known:
        return None
    shape = (1 + max(step for _, step in known), 1 + max(r.layer for r, _ in known))
    total, count, seconds = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    sparse = np.zeros(shape, bool)
    for record, step in known:
        place = step, record.layer
        total[place] += record.density
        count[place] += 1
        seconds[place] += record.seconds or 0.0
        sparse[place] |= record.method.lower() != "dense"
    density = np.full(shape, np.nan)
    np.divide(total, count, out=density, where=count > 0)
    timed = any(r.seconds is not None for r, _ in known)
    return Grids(density=density, seconds=seconds if timed else None, dense=~sparse)
