"""Ring attention: queries stay on their process, keys and values travel."""

from __future__ import annotations

from svg_attention.ring.call import attend_in_ring
from svg_attention.ring.dense import ring_attention
from svg_attention.ring.exchange import Ring

__all__ = ["Ring", "attend_in_ring", "ring_attention"]
