"""Launcher of the compiled kernel for keys in 8-bit integers."""

from __future__ import annotations

from torch import Tensor

from svg_kernels import _library
from svg_kernels.attention.cuda import launch, spoiled_tiles
from svg_kernels.attention.operands import Operands


def block_sparse_attention_int8(
    operands: Operands, scales: tuple[Tensor, ...], out: Tensor, lse: Tensor | None
) -> None:
    """Launch the kernel; see `svg_kernels.block_sparse_attention_int8`."""
    _, _, mean = scales
    if operands.summary_keys is not None:
        dtype = operands.query.dtype
        centred = (operands.summary_keys.float() - mean[:, :, None]).to(dtype)
        operands = operands._replace(summary_keys=centred)
    function = _library.functions(operands.query.device).block_sparse_attention_int8
    others = (*(x.contiguous() for x in scales), spoiled_tiles(operands))
    launch(function, operands, out, lse, others)
