"""Model-agnostic sparse attention for video diffusion: SVG1, SVG2 and beyond."""

from svg_attention.attention import dense_attention, sparse_attention
from svg_attention.errors import UnsupportedError
from svg_attention.layout import TokenLayout
from svg_attention.memory import LayerMemory
from svg_attention.methods import Dense, Method
from svg_attention.plan import KeySummary, SparsePlan
from svg_attention.schedule import Schedule
from svg_attention.session import Call, CallRecord, Session

__all__ = [
    "Call",
    "CallRecord",
    "Dense",
    "KeySummary",
    "LayerMemory",
    "Method",
    "Schedule",
    "Session",
    "SparsePlan",
    "TokenLayout",
    "UnsupportedError",
    "dense_attention",
    "sparse_attention",
]

__version__ = "0.1.0"
