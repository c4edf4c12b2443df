"""Batched exact k-means on GPUs, in Triton, importable alone."""

from .errors import UnsupportedError
from .lloyd import assign, kmeans, update
from .result import KMeansResult, Update

__version__ = "0.1.0"

__all__ = ["KMeansResult", "UnsupportedError", "Update", "assign", "kmeans", "update"]
