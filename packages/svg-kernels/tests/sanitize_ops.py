"""Launch every memory-bound kernel on small shapes; run by `nox -s sanitize`.

What the kernels return is compared with the reference as well.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

import svg_kernels

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FP32, FP16, BF16)
# Every kernel of norm.cu: rows that share a warp, rows of a block, and what vectors cannot serve.
WIDTHS = (1, 32, 64, 128, 130, 136, 256, 264, 1536, 3072, 5120, 8192, 8200)
# More rows than are in flight at once, so that blocks walk over several; wide rows twice as many.
ROWS, WIDE_ROWS = 1100, 220


def randn(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape).to(dtype).cuda()


def both(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Run the compiled kernel, and the reference on the CPU, and compare them."""
    got = function(*args, backend="cuda", **kwargs)
    named = {name: on_cpu(x) for name, x in kwargs.items()}
    want = function(*map(on_cpu, args), backend="reference", **named)
    pairs = [(got, want)] if isinstance(got, Tensor) else zip(got, want, strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.cpu().float(), b.float(), rtol=2e-2, atol=2e-2)


def on_cpu(x: Any) -> Any:
    """Move a tensor, or each of a tuple, to the CPU; leave the rest as it is."""
    if isinstance(x, tuple):
        return tuple(map(on_cpu, x))
    return x.cpu() if isinstance(x, Tensor) else x


def norms(rows: int) -> None:
    for dtype, width in product(DTYPES, WIDTHS):
        count = rows // 2 if width <= 264 else min(rows // 2, WIDE_ROWS)
        x = randn(2, count, width, dtype=dtype)
        weight, bias = randn(width, dtype=dtype), randn(width)
        scale, shift = randn(2, width), randn(2, count, width, dtype=dtype)
        both(svg_kernels.rms_norm, x, weight)
        both(svg_kernels.layer_norm, x, weight, bias)
        both(svg_kernels.layer_norm, x[:, ::3], out_dtype=FP32)
        both(svg_kernels.layer_norm_modulate, x, scale, scale)
        both(svg_kernels.layer_norm_modulate, x, scale, shift, weight=weight)
        both(svg_kernels.gate_residual, x, x, scale)
        both(svg_kernels.gate_residual, x.float(), x, shift, out_dtype=dtype)


def rotations() -> None:
    for dtype, dim, pairing in product(DTYPES, (6, 64, 80, 128, 256), ("interleaved", "half")):
        x, key = randn(2, 5, 37, dim, dtype=dtype), randn(2, 8, 37, dim, dtype=dtype)
        theta = torch.rand(30, dim // 2).cuda()
        tables = (theta.cos(), theta.sin())
        both(svg_kernels.rope, x, *tables, pairing=pairing, start=3)
        both(svg_kernels.rope, (x, key), *tables, pairing=pairing, start=3)
        both(svg_kernels.rope, x, torch.polar(torch.ones_like(theta), theta), pairing=pairing)
        heads = x.transpose(1, 2).flatten(2)
        for weight in (randn(dim), randn(5 * dim, dtype=dtype)):
            both(svg_kernels.qk_norm_rope, heads, heads, weight, weight, *tables, heads=5,
                 pairing=pairing)  # fmt: skip


def permutations() -> None:
    for dtype, dim in product((*DTYPES, torch.uint8), (1, 7, 64, 130)):
        x = (torch.rand(2, 3, 65, dim) * 100).to(dtype).cuda()
        order = torch.rand(2, 3, 65).argsort(-1).int().cuda()
        moved = svg_kernels.permute_rows((x, x.flip(2)), order, backend="cuda")
        back = svg_kernels.unpermute_rows(moved, order, backend="cuda")
        assert torch.equal(back[0], x)
        assert torch.equal(back[1], x.flip(2))


def main() -> None:
    torch.manual_seed(0)
    for rows, quick in ((ROWS, True), (8, False)):
        # Straight to the launchers, then through torch's dispatcher.
        with torch.set_grad_enabled(not quick):
            norms(rows)
            rotations()
            permutations()
        torch.cuda.synchronize()
        print(f"{rows} rows done", flush=True)


if __name__ == "__main__":
    main()
