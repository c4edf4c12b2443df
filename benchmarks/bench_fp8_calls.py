"""Time whole attention calls in e4m3 beside bf16: dense, SVG2, and what quantising takes of them.

    python benchmarks/bench_fp8_calls.py --output benchmarks/results/h100/attention_fp8_calls.json

Keys and values are quantised inside every call. Kernels take turns with a cold L2, after each has
been compared with fp64 on rows drawn at random. A minute on an H100.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _harness import environment, interleave, store, summary
from _sparse_calls import svg2
from _sparse_peers import prepare_cudnn_fp8
from _sparse_workloads import WORKLOADS, Workload, check_close, dense, exact, structured
from torch import Tensor

import svg_kernels
from svg_attention import LayerMemory, SparsePlan, sparse_attention
from svg_attention.tiles import match_heads

AIMS = {"SVG2 25%, e4m3": 46.0, "dense, e4m3": 130.0}  # ms at Wan 720p
ERROR = {"bf16": 5e-3, "e4m3": 0.12}
BACKENDS = {"bf16": "cuda", "e4m3": "cuda_fp8"}
CHECKED_ROWS = 256


def plan_of(
    work: Workload, tensors: Sequence[Tensor], density: float, memory: LayerMemory
) -> SparsePlan:
    """Return the plan of a call that goes on from remembered centroids, which stay as they are."""
    kept = LayerMemory(query_centroids=memory.query_centroids, key_centroids=memory.key_centroids)
    method = replace(svg2(work), density=density)
    return method.plan(*tensors, layout=work.layout, memory=kept)


def calls(work: Workload, tensors: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    query, key, value = tensors
    batch, heads, length, _ = query.shape
    full = SparsePlan.full(batch, heads, length, length, device=query.device)
    memory = LayerMemory()
    svg2(work).plan(query, key, value, layout=work.layout, memory=memory)
    order = plan_of(work, tensors, 0.25, memory).key_order
    if order is None:
        raise RuntimeError("the plan of SVG2 has no order of keys")
    order = match_heads(order, key.shape[1])
    made: dict[str, Callable[[], Any]] = {
        "dense, cuDNN": lambda: dense(query, key, value),
        "permutation, bf16": lambda: svg_kernels.permute_rows((key, value), order),
        "quantising, e4m3": lambda: svg_kernels.quantize_key_value(key, value, order),
        "quantising in order, e4m3": lambda: svg_kernels.quantize_key_value(key, value),
    }
    for name, backend in BACKENDS.items():
        made[f"dense, {name}"] = lambda backend=backend: sparse_attention(
            query, key, value, full, backend=backend
        )
        for density in (0.25, 0.10):

            def attend(density: float = density, backend: str = backend) -> Tensor:
                plan = plan_of(work, tensors, density, memory)
                return sparse_attention(query, key, value, plan, backend=backend)

            made[f"SVG2 {density:.0%}, {name}"] = attend
    return made


def check(work: Workload, tensors: Sequence[Tensor]) -> dict[str, float]:
    """Compare dense calls with fp64 on rows drawn at random; return their errors."""
    query, key, value = tensors
    batch, heads, length, _ = query.shape
    full = SparsePlan.full(batch, heads, length, length, device=query.device)
    draw = torch.Generator(device="cuda").manual_seed(1)
    rows = torch.randint(length, (CHECKED_ROWS,), device="cuda", generator=draw)
    head = heads // 2
    want = exact(query[0, head, rows], key[0, head], value[0, head])
    errors = {}
    for name, backend in BACKENDS.items():
        got = sparse_attention(query, key, value, full, backend=backend)[0, head, rows]
        check_close(f"{work.name}, dense, {name}", got, want, ERROR[name])
        errors[name] = float((got.double() - want).norm() / want.norm())
    return errors


def main() -> None:
    """Read the command line, measure and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--commit", help="recorded where there is no git")
    args = parser.parse_args()
    result: dict[str, Any] = {"environment": environment(args.commit), "rows": []}
    for work in (WORKLOADS[0], WORKLOADS[2]):
        tensors = structured(work)
        errors = check(work, tensors)
        made = calls(work, tensors)
        try:
            made["dense, cuDNN e4m3, rounded beforehand"] = prepare_cudnn_fp8(*tensors)
        except (ImportError, RuntimeError) as error:
            print(f"cuDNN in e4m3 not run: {error!r}"[:300])
        times = interleave(made, samples=args.samples, warmup=2)
        ms = {name: summary(found) for name, found in times.items()}
        result["rows"].append({"workload": work.name, "relative_error": errors, "ms": ms})
        store(args.output, result)
        print(f"{work.name}: relative error of dense {errors}")
        for name, found in ms.items():
            aim = AIMS.get(name) if work.name == "Wan 720p" else None
            asked = "" if aim is None else f"  (at most {aim:.0f} asked)"
            print(f"  {name}: {found['median']:.2f} ms{asked}", flush=True)
        del tensors
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
