"""Kernels, by the names of the published code."""
