"""Batched exact k-means on GPUs, in Triton, importable alone."""

__version__ = "0.1.0"
