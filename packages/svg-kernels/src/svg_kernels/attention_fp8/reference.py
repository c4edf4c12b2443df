"""Block-sparse attention over keys and values in e4m3, in plain torch: they are turned back."""

from __future__ import annotations

from torch import Tensor

from svg_kernels.attention import reference
from svg_kernels.attention.operands import Operands
from svg_kernels.key_value_fp8.rows import Fp8KeyValue


def block_sparse_attention_fp8(
    operands: Operands, scales: tuple[Tensor, ...], out: Tensor, lse: Tensor | None
) -> None:
    """Fill `out` and, unless None, `lse`; nothing but keys and values is rounded to e4m3."""
    key_scale, key_mean, value_scale, value_mean = scales
    key, value = Fp8KeyValue(
        key=operands.key,
        value=operands.value,
        key_scale=key_scale,
        key_mean=key_mean,
        value_scale=value_scale,
        value_mean=value_mean,
    ).dequantized()
    reference.block_sparse_attention(operands._replace(key=key, value=value), out, lse)
