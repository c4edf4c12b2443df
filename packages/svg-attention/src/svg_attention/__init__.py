"""Model-agnostic sparse attention for video diffusion: SVG1, SVG2 and beyond."""

import svg_attention._kmeans_files  # noqa: F401 - raises where flash_kmeans is another project's
from svg_attention.attention import dense_attention, dense_backend, sparse_attention
from svg_attention.errors import UnsupportedError
from svg_attention.layout import TokenLayout
from svg_attention.log import Call, CallRecord
from svg_attention.memory import LayerMemory
from svg_attention.methods import (
    SVG1,
    SVG2,
    SVGEAR,
    Arrivals,
    Dense,
    HeadShare,
    Method,
    RandomBlocks,
    cluster_counts,
    method_from_dict,
)
from svg_attention.metrics import density, needed_density, recall
from svg_attention.plan import KeySummary, SparsePlan
from svg_attention.ring import Ring, ring_attention
from svg_attention.schedule import Schedule
from svg_attention.session import Session
from svg_attention.status import BackendStatus, backend_status

__all__ = [
    "BackendStatus",
    "Call",
    "CallRecord",
    "Dense",
    "RandomBlocks",
    "Ring",
    "SVG1",
    "SVG2",
    "SVGEAR",
    "Arrivals",
    "HeadShare",
    "KeySummary",
    "LayerMemory",
    "Method",
    "Schedule",
    "Session",
    "SparsePlan",
    "TokenLayout",
    "UnsupportedError",
    "backend_status",
    "cluster_counts",
    "dense_attention",
    "dense_backend",
    "density",
    "method_from_dict",
    "needed_density",
    "recall",
    "ring_attention",
    "sparse_attention",
]

__version__ = "0.1.0"
