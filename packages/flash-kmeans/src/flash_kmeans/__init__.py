"""Batched exact k-means on GPUs, in Triton, importable alone."""

import importlib
from typing import Any

from .distributed import kmeans_distributed
from .errors import UnsupportedError
from .estimator import KMeans
from .kmeans import assign, kmeans, update
from .result import KMeansResult, Update
from .streaming import StreamResult, kmeans_stream

__version__ = "0.1.0"

# Another distribution installs files of this import name; whoever builds on ours can tell by this.
__distribution__ = "svg-flash-kmeans"

__all__ = [
    "KMeans",
    "KMeansResult",
    "StreamResult",
    "UnsupportedError",
    "Update",
    "assign",
    "kmeans",
    "kmeans_distributed",
    "kmeans_stream",
    "update",
]

# The names of `flash-kmeans` 0.3.1, so that code written for it runs: its functions are in
# `compat`, and a module for each of its submodules lies in that folder.
_COMPAT_NAMES = {
    "FlashKMeans",
    "batch_kmeans_Cosine",
    "batch_kmeans_Dot",
    "batch_kmeans_Euclid",
    "kmeans_largeN",
    "kmeans_largeN_assign",
    "triton_centroid_update_euclid",
    "triton_centroid_update_sorted_euclid",
}
_COMPAT_MODULES = {
    "assign_euclid_triton",
    "centroid_update_triton",
    "interface",
    "kmeans_large",
    "kmeans_triton_impl",
    "torch_fallback",
}
# First, so that files which the other distribution left in this folder are not found.
__path__.insert(0, f"{__path__[0]}/compat")


def __getattr__(name: str) -> Any:
    if name in _COMPAT_NAMES:
        return getattr(importlib.import_module(f"{__name__}.compat"), name)
    if name in _COMPAT_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
