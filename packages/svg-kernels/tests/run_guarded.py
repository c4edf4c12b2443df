"""Run every emulated kernel on tensors with forbidden pages around them: `run_guarded.py LIBRARY`.

In a process of its own, which the operating system ends if a kernel reads or writes outside.
"""

from __future__ import annotations

import sys
from itertools import product

import torch
import tvm_ffi
from guarded import guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 24, 64, 130, 136, 256, 264, 3072, 5120, 5128, 8200)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return guarded(torch.randn(*shape).to(dtype))


def rows(lib: tvm_ffi.Module, dtype: torch.dtype, width: int) -> list[bool]:
    x, y, bias = random(1, 5, width, dtype=dtype), random(1, 5, width, dtype=dtype), random(width)
    weight, one, each = random(width, dtype=dtype), random(1, width), random(1, 5, width)
    return [
        lib.norm(x, weight, bias, None, None, y, 1e-6, True),
        lib.norm(x, weight, None, None, None, y, 1e-6, False),
        lib.norm(x, None, None, one, each, y, 1e-6, True),
        lib.gate_residual(x, x, each, y),
    ]


def heads(lib: tvm_ffi.Module, dtype: torch.dtype, dim: int, half: bool) -> list[bool]:
    tables = random(7, dim // 2), random(7, dim // 2)
    x, key = random(1, 3, 7, dim, dtype=dtype), random(1, 5, 7, dim, dtype=dtype)
    done = [
        lib.rope(x, x, None, None, *tables, half, 0),
        lib.rope(x, x, None, None, random(7, dim), random(7, dim), half, 0),
        lib.rope(x, x, key, key, *tables, half, 0),
        lib.rope(key, key, x, x, *tables, half, 0),
    ]
    flat = random(1, 7, 3 * dim, dtype=dtype)
    outs = random(1, 3, 7, dim, dtype=dtype), random(1, 3, 7, dim, dtype=dtype)
    for weight in (random(dim), random(3 * dim, dtype=dtype)):
        done.append(lib.qk_norm_rope(flat, flat, weight, weight, *outs, *tables, 1e-6, half, 0))
    return done


def permutation(lib: tvm_ffi.Module, dtype: torch.dtype, dim: int) -> list[bool]:
    x, y = random(2, 3, 9, dim, dtype=dtype), random(2, 3, 9, dim, dtype=dtype)
    order = guarded(torch.rand(2, 3, 9).argsort(-1).int())
    return [lib.permute_rows(inverse, x, order, y, *[None] * 9) for inverse in (False, True)]


library = tvm_ffi.load_module(sys.argv[1])
for dtype in DTYPES:
    for width in WIDTHS:
        assert all(rows(library, dtype, width)), width
    for dim, half in product((6, 64, 80, 128, 256), (False, True)):
        assert all(heads(library, dtype, dim, half)), dim
    for dim in (1, 7, 64, 130):
        assert all(permutation(library, dtype, dim)), dim
