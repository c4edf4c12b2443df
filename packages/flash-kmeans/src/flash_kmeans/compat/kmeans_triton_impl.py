"""Whole clusterings of the original's `flash_kmeans.kmeans_triton_impl`."""

from flash_kmeans.compat import (
    batch_kmeans_Cosine,
    batch_kmeans_Dot,
    batch_kmeans_Euclid,
)

__all__ = [
    "batch_kmeans_Cosine",
    "batch_kmeans_Dot",
    "batch_kmeans_Euclid",
]
