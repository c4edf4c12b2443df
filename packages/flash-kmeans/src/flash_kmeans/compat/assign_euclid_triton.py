"""Labels, of the original's `flash_kmeans.assign_euclid_triton`."""

from flash_kmeans.compat import (
    cosine_assign_triton,
    euclid_assign_triton,
)

__all__ = [
    "cosine_assign_triton",
    "euclid_assign_triton",
]
