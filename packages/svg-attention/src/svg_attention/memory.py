"""What a method remembers from one denoising step to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class LayerMemory:
    """Hold what lasts between the steps of one layer, guidance branch and transformer.

    A new video starts with new memories; a method that finds a memory of another shape, type or
    device ignores it and starts over.

    Attributes:
        query_centroids: `[B, H, q_clusters, D]`, the query clusters of the last planned call.
        key_centroids: `[B, H, k_clusters, D]`, the key clusters of the last planned call.
        choice: what the last planned call read, if other calls are to read the same.
        chooser: the method that chose it.
        readers: calls of this layer and branch that have read by it, the one that chose included.
    """

    query_centroids: Tensor | None = None
    key_centroids: Tensor | None = None
    choice: Any = None
    chooser: Any = None
    readers: int = 0
