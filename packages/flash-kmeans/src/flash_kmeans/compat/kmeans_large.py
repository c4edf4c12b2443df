"""Points on the host, of the original's `flash_kmeans.kmeans_large`."""

from flash_kmeans.compat import (
    kmeans_largeN,
    kmeans_largeN_assign,
)

__all__ = [
    "kmeans_largeN",
    "kmeans_largeN_assign",
]
