"""GELU in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from svg_kernels._rows import rows_in_three

BLOCK = 4096


@triton.jit
def activate(x, TANH: tl.constexpr, ROUGH: tl.constexpr):
    """Return GELU of fp32 values, by the error function or by its approximation.

    What is rounded to a few bits next may be `ROUGH`, to 1e-6: it takes fewer instructions.
    """
    if TANH:
        # 0.5 (1 + tanh u) = 1 / (1 + exp(-2u)), which needs no tanh.
        if ROUGH:
            root = tl.rsqrt(1.0 + tl.exp2(x * (-2.302208198144325 - 0.1029432395800235 * x * x)))
            return x * root * root
        else:
            twice = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            return x / (1.0 + tl.exp(-twice))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_kernel(
    x_ptr, y_ptr, inner, width, x_outer, x_inner, y_outer, y_inner,
    TANH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute `BLOCK_C` values of one row."""
    row = tl.program_id(0).to(tl.int64)
    outer, within = row // inner, row % inner
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = column < width
    x = tl.load(x_ptr + outer * x_outer + within * x_inner + column, mask, 0.0).to(tl.float32)
    y = activate(x, TANH, False).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + outer * y_outer + within * y_inner + column, y, mask)


def gelu(x: Tensor, out: Tensor, approximate: str) -> None:
    """Launch `gelu_kernel`; see `reference.gelu`."""
    if x.numel() == 0:
        return
    width = x.shape[-1]
    source = rows_in_three(x)
    target = out if out.ndim == 3 else out.view(1, -1, width) if out.is_contiguous() else None
    if target is None:
        target = x.new_empty(source.shape)
    outer, inner = source.shape[:2]
    block = min(BLOCK, triton.next_power_of_2(width))
    gelu_kernel[(outer * inner, triton.cdiv(width, block))](
        source, target, inner, width,
        *source.stride()[:2], *target.stride()[:2],
        TANH=approximate == "tanh", BLOCK_C=block, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))
