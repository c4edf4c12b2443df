"""Block-sparse attention over keys in 8-bit integers, in plain torch: they are turned back."""

from __future__ import annotations

from torch import Tensor

from svg_kernels.attention import reference
from svg_kernels.attention.operands import Operands
from svg_kernels.key_int8.rows import Int8Key


def block_sparse_attention_int8(
    operands: Operands, scales: tuple[Tensor, ...], out: Tensor, lse: Tensor | None
) -> None:
    """Fill `out` and, unless None, `lse`; nothing but keys is rounded."""
    row_scale, channel_scale, mean = scales
    key = Int8Key(key=operands.key, row_scale=row_scale, channel_scale=channel_scale, mean=mean)
    reference.block_sparse_attention(operands._replace(key=key.dequantized()), out, lse)
