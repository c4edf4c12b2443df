"""Compile the kernels that quantise keys and values for GPUs that are not here.

Run by test_triton_compiled.py in a process of its own, where nothing is interpreted. Prints, for
each operation and device, a compute capability and the most bytes of shared memory that a block
takes there.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from svg_kernels.key_int8 import triton as int8
from svg_kernels.key_value_fp8 import triton as fp8
from svg_kernels.rotation import HEAD_DIM

DATA = ("key_ptr", "value_ptr")
TYPES = {"order_ptr": "*i32", "rotation_ptr": "*fp16"}


def shared_bytes(
    kernel: Any, capability: int, data: str, outputs: dict[str, str], **constants: Any
) -> int:
    """Return the shared memory of a block."""
    constants["D"] = HEAD_DIM
    signature = {}
    for name in kernel.arg_names:
        pointer = f"*{data}" if name in DATA else "*fp32"
        pointer = (TYPES | outputs).get(name, pointer)
        signature[name] = pointer if name.endswith("_ptr") else "i32"
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


for module, capability, data in (
    *((fp8, 89, "bf16"), (fp8, 90, "bf16"), (fp8, 120, "fp32")),
    *((int8, 80, "bf16"), (int8, 90, "bf16"), (int8, 120, "fp32")),
):
    gathers = {"CHUNK": module.CHUNK_ROWS, "BLOCK_S": module.STATISTICS_ROWS}
    rounds: dict[str, Any] = {"HAS_ORDER": True, "BLOCK_S": module.BLOCK_ROWS}
    if module is fp8:
        limits: dict[str, Any] = {
            "LARGEST": fp8.LARGEST,
            "SMALLEST": fp8.SMALLEST,
            "FLATTEST": fp8.FLATTEST,
        }
        last, outputs = (
            fp8.quantize_key_value_kernel,
            {"key_out_ptr": "*fp8e4nv", "value_out_ptr": "*fp8e4nv"},
        )
    else:
        limits = {"BALANCED": int8.BALANCED, "SMALLEST": int8.SMALLEST}
        rounds |= {"LARGEST": int8.LARGEST, "SMALLEST": int8.SMALLEST}
        last, outputs = int8.quantize_key_kernel, {"out_ptr": "*i8"}
    found = (
        shared_bytes(module.statistics_kernel, capability, data, {}, **gathers),
        shared_bytes(module.scales_kernel, capability, data, {}, **limits),
        shared_bytes(last, capability, data, outputs, **rounds),
    )
    print(capability, max(found))
