"""Compile kernels for GPUs that are not there; run as a script, it prints one JSON line a kernel.

Arguments: capabilities such as `9.0`, or nothing for all. A process of its own, because the tests
of kernels run in Triton's interpreter, which replaces the compiler.
"""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_kmeans.triton import assign, assign_sm90, launch_config, order, update

# Capabilities with the instructions of another one: a row that both share is compiled once.
TWINS = {(8, 6): (8, 0), (8, 9): (8, 6)}
TYPES = {2: "bf16", 4: "fp32"}


def build(
    source: type[ASTSource],
    function: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    capability: launch_config.Capability,
    **options: int,
) -> Any:
    """Compile one kernel, pointers and strides being multiples of 16."""
    names = function.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = [n for n, t in types.items() if t.startswith("*") or n.startswith("stride")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    values = {(names.index(n),): v for n, v in constants.items()}
    major, minor = capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    return triton.compile(source(function, signature, values, attributes), target, options)


def assignment(
    capability: launch_config.Capability, size: int, width: int, tile: launch_config.Tile
) -> Any:
    """Compile the assign kernel for a row of the tile table, at its widest."""
    dtype, described = TYPES[size], capability >= (9, 0)
    dim = width or 4 * tile.block_d
    types = {
        "x": f"*{dtype}",
        "directions": f"tensordesc<{dtype}[{tile.block_k},{tile.block_d}]>",
        **dict.fromkeys(("scale", "origin"), "*fp32"),
        "bias": f"tensordesc<fp32[{tile.block_k}]>",
        "labels": "*i32",
        **dict.fromkeys(("N", "k_tiles", "n_tiles"), "i32"),
        **dict.fromkeys(("stride_xb", "stride_xn"), "i64"),
    }
    if not described:
        types |= {"directions": f"*{dtype}", "bias": "*fp32"}
    constants = {
        "D": dim,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "BLOCK_D": tile.block_d,
        "D_TILES": -(-dim // tile.block_d),
        "STAGES": tile.stages,
        "DESCRIBED": described,
        "SCALED": False,
        "CENTERED": size == 4,
        "PRECISION": "tf32x3" if size == 4 else None,
    }
    return build(
        ASTSource, assign.assign_kernel, types, constants, capability, num_warps=tile.warps
    )


def hopper() -> Any:
    """Compile the warp-specialised kernel."""
    from triton.experimental.gluon._runtime import GluonASTSource

    shapes = {"points": assign_sm90.BLOCK_N, "directions": assign_sm90.BLOCK_K}
    layouts = {n: assign_sm90.shared_layout(r, assign_sm90.gl.bfloat16) for n, r in shapes.items()}
    types = {n: f"tensordesc<bf16[{r},128],{layouts[n]!r}>" for n, r in shapes.items()}
    types |= {"bias": "*fp32", "labels": "*i32"}
    sizes = ("N", "row_step", "column_step", "n_tiles", "k_tiles", "total")
    types |= dict.fromkeys(sizes, "i32")
    constants = {
        "BLOCK_N": assign_sm90.BLOCK_N,
        "BLOCK_K": assign_sm90.BLOCK_K,
        "D": assign_sm90.DIM,
        "STAGES": assign_sm90.STAGES,
        "GROUPS": assign_sm90.GROUPS,
    }
    kernel = assign_sm90.assign_kernel
    return build(GluonASTSource, kernel, types, constants, (9, 0), num_warps=assign_sm90.WARPS)


def updating(capability: launch_config.Capability, size: int) -> Any:
    """Compile the kernel that sums points per cluster."""
    wide = "fp32" if size == 2 else "fp64"
    types = {
        **dict.fromkeys(("x", "previous"), f"*{TYPES[size]}"),
        **dict.fromkeys(("scale", "weight", "costs"), "*fp32"),
        **dict.fromkeys(("sums", "totals", "piece_sums", "piece_totals"), f"*{wide}"),
        **dict.fromkeys(("order", "labels", "starts"), "*i32"),
        **dict.fromkeys(("N", "K", "spans"), "i32"),
        **dict.fromkeys(("stride_xb", "stride_xn"), "i64"),
    }
    constants = {
        "D": 128,
        "SPAN": 256,
        "BLOCK_N": 32 // size,
        "BLOCK_D": 128,
        "SUM": tl.float32 if size == 2 else tl.float64,
        "SCALED": True,
        "WEIGHTED": True,
        "WITH_COST": True,
    }
    return build(ASTSource, update.segment_sums_kernel, types, constants, capability, num_warps=1)


def finishing(capability: launch_config.Capability, size: int) -> Any:
    """Compile the kernel that turns sums into centroids."""
    wide = "fp32" if size == 2 else "fp64"
    floats = ("sums", "totals", "piece_sums", "piece_totals", "raw_sums", "raw_totals", "costs")
    types = {
        "starts": "*i32",
        **dict.fromkeys(("centroids", "directions"), f"*{TYPES[size]}"),
        **dict.fromkeys(floats, f"*{wide}"),
        **dict.fromkeys(("bias", "direction_scale"), "*fp32"),
        **dict.fromkeys(("K", "spans", "rows"), "i32"),
    }
    constants = {
        "D": 128,
        "SPAN": 256,
        "BLOCK_P": 8,
        "BLOCK_D": 128,
        "SUM": tl.float32 if size == 2 else tl.float64,
        "METRIC": "cosine",
        "WEIGHTED": True,
        "WITH_COST": True,
        "RAW": False,
        "WIDTH": 128 if size == 2 else 0,
    }
    return build(ASTSource, update.finish_kernel, types, constants, capability, num_warps=1)


def scanning(capability: launch_config.Capability) -> Any:
    """Compile the kernel that turns counts of labels into sizes and starts."""
    types = dict.fromkeys(("counts", "sizes", "starts", "arrived"), "*i32")
    types |= dict.fromkeys(("K", "chunks", "k_blocks"), "i32")
    constants = {"BLOCK_C": 32, "BLOCK_K": 64, "WIDE": 1024}
    return build(ASTSource, order.scan_chunks_kernel, types, constants, capability, num_warps=4)


def report(
    name: str, capability: launch_config.Capability, began: float, kernel: Any, **more: bool
) -> None:
    """Print what the compiler says of one kernel."""
    ptx = kernel.asm["ptx"]
    print(
        json.dumps(
            {
                "kernel": name,
                "capability": capability,
                "shared": kernel.metadata.shared,
                "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
                "bulk": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
                "seconds": round(time.perf_counter() - began, 2),
                **more,
            }
        ),
        flush=True,
    )


def main(chosen: list[str]) -> None:
    """Compile for the chosen capabilities, `major.minor` each."""
    for capability, table in launch_config.TABLE.items():
        if chosen and "{}.{}".format(*capability) not in chosen:
            continue
        for (size, width), tile in table.items():
            if tile == launch_config.TABLE.get(TWINS.get(capability), {}).get((size, width)):
                continue
            began = time.perf_counter()
            kernel = assignment(capability, size, width, tile)
            name = f"assign {TYPES[size]} {width or 'any'}"
            twin = any(launch_config.TABLE[c].get((size, width)) == tile for c in TWINS)
            report(name, capability, began, kernel, shared_with_twin=twin)
        for size, dtype in TYPES.items():
            began = time.perf_counter()
            report(f"sums {dtype}", capability, began, updating(capability, size))
            began = time.perf_counter()
            report(f"finish {dtype}", capability, began, finishing(capability, size))
        began = time.perf_counter()
        report("scan", capability, began, scanning(capability))
        if capability == (9, 0):
            began = time.perf_counter()
            report("assign sm90", capability, began, hopper())


if __name__ == "__main__":
    main(sys.argv[1:])
