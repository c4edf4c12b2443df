"""Planning with Triton kernels, function for function as in `reference.py`."""

from svg_attention.planning.triton.dealing import deal_heads
from svg_attention.planning.triton.order import long_tiles_first
from svg_attention.planning.triton.pattern_error import pattern_error
from svg_attention.planning.triton.probe_sums import probe_sums
from svg_attention.planning.triton.probes import probe_mass, probe_means
from svg_attention.planning.triton.runs import merge_clusters, round_runs
from svg_attention.planning.triton.selection import keep_budget, keep_top_p
from svg_attention.tiles import COPY_ROWS

# Runs of a multiple of rows need no mask in the compiled kernel, and long tiles are started first.
RUN_MULTIPLE = COPY_ROWS
ORDERS_TILES = True

__all__ = [
    "ORDERS_TILES",
    "RUN_MULTIPLE",
    "deal_heads",
    "keep_budget",
    "keep_top_p",
    "long_tiles_first",
    "merge_clusters",
    "pattern_error",
    "probe_mass",
    "probe_means",
    "probe_sums",
    "round_runs",
]
