"""Compile the Triton norms for a GPU that is not here; print their square roots and divisions.

Run by test_triton_compiled.py in a process of its own, where nothing is interpreted.
"""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from svg_kernels.norm.triton import norm_rows_kernel
from svg_kernels.qk_norm_rope.triton import qk_norm_rope_kernel

INSTRUCTION = re.compile(r"\b(?:sqrt|rsqrt|rcp|div)\.[\w.]*f32")


def instructions(kernel: Any, **constants: Any) -> set[str]:
    names = kernel.arg_names
    signature = {name: "i32" for name in names} | {"eps": "fp32"}
    signature |= {name: "*fp32" for name in names if name.endswith("_ptr")}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    return set(INSTRUCTION.findall(compiled.asm["ptx"]))


found = instructions(
    norm_rows_kernel,
    ADDED=True,
    GATED=True,
    CENTER=True,
    HAS_WEIGHT=True,
    HAS_BIAS=False,
    MODULATED=False,
    QUANTISED=False,
    BLOCK_R=4,
    BLOCK_C=64,
    PIECES=1,
)
for across in (True, False):
    found |= instructions(qk_norm_rope_kernel, ACROSS=across, ROTATE=True, BLOCK_H=4, BLOCK_P=32)
print(*sorted(found))
