"""The estimator of the original's `flash_kmeans.interface`."""

from flash_kmeans.compat import (
    FlashKMeans,
)

__all__ = [
    "FlashKMeans",
]
