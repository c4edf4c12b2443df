"""The norm with which a block begins, computed by the block before it.

A block ends by adding to its hidden states, the next one begins by normalising them: one pass over
the rows does both. The block before leaves the norm where the next one looks, with what it is the
norm of; whoever finds that something has come in between computes its own.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import Tensor

__all__ = ["Beginning"]


class Beginning:
    """Where a block looks for the norm it begins with.

    Attributes:
        wanted: whether it pays to leave a norm here; not once one was of other states than came.
    """

    def __init__(self) -> None:
        self.wanted = True
        self._left: tuple[Any, _Mark, _Mark, int] | None = None

    def leave(self, normed: Any, states: Tensor, modulation: Tensor) -> None:
        """Leave a norm for the next call.

        Args:
            normed: the norm.
            states: what it is the norm of.
            modulation: what its scale and shift were made from.
        """
        self._left = normed, _Mark(states), _Mark(modulation), threading.get_ident()

    def take(self, states: Tensor, modulation: Tensor) -> Any:
        """Return the norm of these states if it was left here, else None; it is gone then."""
        left, self._left = self._left, None
        if left is None:
            return None
        normed, of, by, thread = left
        if of.is_on(states) and by.is_on(modulation):
            return normed
        # Two pipelines in threads of their own may share a transformer.
        self.wanted = self.wanted and thread != threading.get_ident()
        return None

    def drop(self) -> None:
        """Let go of what was left."""
        self._left = None

    def clear(self) -> None:
        """Let go of what was left, and forget that it was ever in vain."""
        self._left, self.wanted = None, True


class _Mark:
    """A tensor, held weakly, as it is now."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = weakref.ref(tensor), tensor._version

    def is_on(self, tensor: Tensor) -> bool:
        """Return whether this is the tensor, and nobody has written to it."""
        return self._tensor() is tensor and self._version == tensor._version
