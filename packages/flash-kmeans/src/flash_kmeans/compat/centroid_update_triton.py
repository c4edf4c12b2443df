"""Means, of the original's `flash_kmeans.centroid_update_triton`."""

from flash_kmeans.compat import (
    torch_loop_centroid_update_cosine,
    triton_centroid_update_cosine,
    triton_centroid_update_euclid,
    triton_centroid_update_sorted_cosine,
    triton_centroid_update_sorted_euclid,
)

__all__ = [
    "torch_loop_centroid_update_cosine",
    "triton_centroid_update_cosine",
    "triton_centroid_update_euclid",
    "triton_centroid_update_sorted_cosine",
    "triton_centroid_update_sorted_euclid",
]
