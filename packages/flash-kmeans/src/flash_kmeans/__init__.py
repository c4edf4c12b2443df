"""Batched exact k-means on GPUs, in Triton, importable alone."""

from .distributed import kmeans_distributed
from .errors import UnsupportedError
from .estimator import KMeans
from .kmeans import assign, kmeans, update
from .result import KMeansResult, Update
from .streaming import StreamResult, kmeans_stream

__version__ = "0.1.0"

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
