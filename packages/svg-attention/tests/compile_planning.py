"""Compile the planning kernels that hold tiles in shared memory, without a GPU.

Run by test_planning_compile.py in a process of its own, where Triton is not interpreted. Exits
with the number of kernels that do not fit.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from svg_attention.planning.triton import probes
from svg_attention.planning.triton.launch import Blocks
from svg_attention.planning.triton.pattern_error import BLOCKS as PATTERN_BLOCKS
from svg_attention.planning.triton.pattern_error import pattern_error_kernel
from svg_attention.planning.triton.probe_sums import BLOCKS as ERROR_BLOCKS
from svg_attention.planning.triton.probe_sums import probe_sums_kernel

SHARED_KB = {80: 163, 86: 99, 90: 227}
FLOATS = (
    "errors",
    "biases",
    "lse",
    "mass",
    "weights",
    "energy",
    "agreement",
    "scratch",
    "outs",
    "sums",
    "tops",
)
INTEGERS = ("starts", "order")


def shared_bytes(
    kernel: Any, capability: int, size: int, constants: dict[str, Any], blocks: Blocks
) -> int:
    """Return the shared memory of a block."""
    names = kernel.arg_names
    data = "*bf16" if size == 2 else "*fp32"
    pointers = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(INTEGERS, "*i32")
    pointers |= dict.fromkeys(("means", "centroids", "rows", "key", "value"), data)
    pointers |= {"reads": "*u8", "scale_log2": "fp32", "largest_bias": "fp32"}
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in ("D", "DV") or name[1:2] == "_"
    }
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    target = GPUTarget("cuda", capability, 32)
    return int(triton.compile(source, target=target, options=options).metadata.shared)


def main(capability: int, sizes: list[int], widths: list[int]) -> int:
    misfits = 0
    for size in sizes:
        for width in widths:
            common = {"BLOCK_D": width, "PRECISION": "tf32" if size == 2 else "ieee"}
            probe = {"PROBE_ROWS": 16, "PROBES": 8}
            for kernel, blocks, constants in (
                (probes.mass_kernel, probes.MASS[size, width], {"PER_KEY": True, **probe}),
                (
                    probe_sums_kernel,
                    ERROR_BLOCKS[size, width],
                    {"ALL_C": 1024, "TOGETHER": 16, **probe},
                ),
                (pattern_error_kernel, PATTERN_BLOCKS[size, width], {"BLOCK_DV": width}),
            ):
                constants = common | constants | blocks.constants()
                constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
                used = shared_bytes(kernel, capability, size, constants, blocks)
                print(kernel.__name__, size, width, used, "of", SHARED_KB[capability] * 1024)
                misfits += used > SHARED_KB[capability] * 1024
    return misfits


if __name__ == "__main__":
    capability, sizes, widths = sys.argv[1:]
    sys.exit(
        main(
            int(capability),
            [int(x) for x in sizes.split(",")],
            [int(x) for x in widths.split(",")],
        )
    )
