"""What plans are built of: probes, estimates, selections, runs and orders.

An operation has one file that states it, and is computed by `reference.py` on any device or by the
kernels in `triton/` on a GPU. Nothing here knows a method or a backend of attention.
"""
