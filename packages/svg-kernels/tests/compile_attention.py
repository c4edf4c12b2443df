"""Compile every row of the attention kernel's table for its device, without a GPU.

Run by test_attention_triton.py in processes of their own: `compile_attention.py PART PARTS`
compiles each PARTS-th row from the PART-th on. Exits with the number of rows that do not fit.
"""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from svg_kernels.attention import triton as attention

SHARED_KB = {80: 163, 86: 99, 90: 227}
POINTERS = {
    "lse": "*fp32",
    "summary_weights": "*fp32",
    "query_order": "*i32",
    "run_starts": "*i32",
    "run_lengths": "*i32",
    "chunk_counts": "*i32",
    "tile_order": "*i32",
}
DATA = ("query", "key", "value", "out", "summary_keys", "summary_values")


def shared_bytes(capability: int, size: int, dim: int) -> int:
    """Return the shared memory of a block."""
    blocks = attention.BLOCKS[capability, size, dim]
    constants = {
        "D": dim,
        "BLOCK_D": dim,
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.keys,
        "STAGES": blocks.stages,
        "PRECISION": "ieee" if size == 4 else "tf32",
        "HAS_ORDER": True,
        "HAS_TILE_ORDER": True,
        # Its loop is not pipelined, so that it needs less than the main loop where that is.
        "HAS_SUMMARY": blocks.stages == 1,
        "HAS_LSE": True,
    }
    names = attention.block_sparse_attention_kernel.arg_names
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in DATA:
            signature[name] = "*bf16" if size == 2 else "*fp32"
        else:
            signature[name] = POINTERS.get(name, "fp32" if name == "qk_scale" else "i32")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name[:2] in ("q_", "k_", "v_", "o_")
    }
    source = ASTSource(
        attention.block_sparse_attention_kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": blocks.warps}
    target = GPUTarget("cuda", capability, 32)
    return int(triton.compile(source, target=target, options=options).metadata.shared)


def main(part: int, parts: int) -> int:
    misfits = []
    for row in list(attention.BLOCKS)[part::parts]:
        used, limit = shared_bytes(*row), SHARED_KB[row[0]] * 1024
        print(row, used, "of", limit)
        if used > limit:
            misfits.append(row)
    print("do not fit:", misfits)
    return len(misfits)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
