"""Every query reads every key."""

from __future__ import annotations

from dataclasses import dataclass

from svg_attention.methods.base import Method
from svg_attention.methods.call import AttentionCall
from svg_attention.plan import SparsePlan


@dataclass(frozen=True, kw_only=True, repr=False)
class Dense(Method):
    """Compute every pair: the baseline, and what warm-up steps run."""

    @property
    def is_full(self) -> bool:
        """True."""
        return True

    def build(self, call: AttentionCall) -> SparsePlan:
        """Return the full plan."""
        return call.full_plan()
