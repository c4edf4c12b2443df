"""Methods decide which keys each query reads; they meet the backends only in the plan."""

from svg_attention.methods.base import Method
from svg_attention.methods.dense import Dense

__all__ = ["Dense", "Method"]
