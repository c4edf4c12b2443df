"""Plain torch, of the original's `flash_kmeans.torch_fallback`."""

from flash_kmeans.compat import (
    batch_kmeans_Euclid_torch_native,
    euclid_assign_torch_native_chunked,
    torch_loop_centroid_update,
)

__all__ = [
    "batch_kmeans_Euclid_torch_native",
    "euclid_assign_torch_native_chunked",
    "torch_loop_centroid_update",
]
