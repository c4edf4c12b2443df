"""Compile the kernels that quantise keys and values for GPUs that are not here.

Run by test_triton_compiled.py in a process of its own, where nothing is interpreted. Prints a
compute capability and the most bytes of shared memory that a block takes there.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from svg_kernels.key_value_fp8.rows import FLATTEST, HEAD_DIM, LARGEST, SMALLEST
from svg_kernels.key_value_fp8.triton import (
    BLOCK_ROWS,
    CHUNK_ROWS,
    STATISTICS_ROWS,
    quantize_key_value_kernel,
    scales_kernel,
    statistics_kernel,
)

DATA = ("key_ptr", "value_ptr")
TYPES = {"order_ptr": "*i32", "rotation_ptr": "*fp16", "key_out_ptr": "*fp8e4nv"}
TYPES["value_out_ptr"] = TYPES["key_out_ptr"]


def shared_bytes(kernel: Any, capability: int, data: str, **constants: Any) -> int:
    """Return the shared memory of a block."""
    signature = {}
    for name in kernel.arg_names:
        pointer = f"*{data}" if name in DATA else "*fp32"
        signature[name] = TYPES.get(name, pointer) if name.endswith("_ptr") else "i32"
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # What torch allocates is aligned, and so are the rows of the models.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or name in ("kb", "kh", "ks", "vb", "vh", "vs")
    }
    source = ASTSource(kernel, signature, constexprs=places, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    shared: int = compiled.metadata.shared
    return shared


for capability, data in ((89, "bf16"), (90, "bf16"), (120, "fp32")):
    found = (
        shared_bytes(
            statistics_kernel,
            capability,
            data,
            CHUNK=CHUNK_ROWS,
            BLOCK_S=STATISTICS_ROWS,
            D=HEAD_DIM,
        ),
        shared_bytes(
            scales_kernel,
            capability,
            data,
            LARGEST=LARGEST,
            SMALLEST=SMALLEST,
            FLATTEST=FLATTEST,
            D=HEAD_DIM,
        ),
        shared_bytes(
            quantize_key_value_kernel,
            capability,
            data,
            HAS_ORDER=True,
            BLOCK_S=BLOCK_ROWS,
            D=HEAD_DIM,
        ),
    )
    print(capability, max(found))
