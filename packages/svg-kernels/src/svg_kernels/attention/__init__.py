"""Attention in which each tile of query rows reads its own runs of key rows."""

from svg_kernels.attention._tiers import unsupported
from svg_kernels.attention.operands import TILE_ROWS
from svg_kernels.attention.sparse import block_sparse_attention

__all__ = ["TILE_ROWS", "block_sparse_attention", "unsupported"]
