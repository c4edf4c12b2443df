"""Launcher of the compiled kernel for keys and values in e4m3."""

from __future__ import annotations

from torch import Tensor

from svg_kernels import _library
from svg_kernels.attention.cuda import launch
from svg_kernels.attention.operands import Operands


def block_sparse_attention_fp8(
    operands: Operands, scales: tuple[Tensor, ...], out: Tensor, lse: Tensor | None
) -> None:
    """Launch the kernel; see `svg_kernels.block_sparse_attention_fp8`."""
    _, key_mean, _, value_mean = scales
    if operands.summary_keys is not None and operands.summary_values is not None:
        dtype = operands.query.dtype
        operands = operands._replace(
            summary_keys=(operands.summary_keys.float() - key_mean[:, :, None]).to(dtype),
            summary_values=(operands.summary_values.float() - value_mean[:, :, None]).to(dtype),
        )
    function = _library.functions(operands.query.device).block_sparse_attention_fp8
    launch(function, operands, out, lse, tuple(x.contiguous() for x in scales))
