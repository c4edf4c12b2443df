"""Kernels that were written in Triton there."""
