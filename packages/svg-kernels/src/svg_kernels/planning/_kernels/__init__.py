"""Triton kernels that probe tiles."""
