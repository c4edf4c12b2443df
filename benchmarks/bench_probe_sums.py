"""Measure the pass of the probes over every key, and whole SVG2 calls that are built on it.

    python benchmarks/bench_probe_sums.py run --gpu h100
    python benchmarks/bench_probe_sums.py table --gpu h100

`run` first compares some tiles with fp64; then all callables take turns, each with a cold L2. Data
is structured, and clusters come from our k-means on it, as in `bench_sparse_attention.py`. Rates
count what the pass must multiply: `2 * heads * probes * keys * head_dim` for scores, and as much
again where the outputs of probes are asked for.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _harness import (
    RESULTS,
    conditions,
    environment,
    interleave,
    load,
    store,
    summary,
    table,
)
from _sparse_calls import capture, scratch
from _sparse_workloads import HEAD_DIM, WORKLOADS, Workload, structured
from torch import Tensor

import svg_kernels
from svg_attention import SVG2, LayerMemory, sparse_attention
from svg_attention.methods.call import AttentionCall
from svg_attention.planning.clustering import Clusters
from svg_attention.planning.clusters import mean_values
from svg_attention.planning.probe_sums import probe_sums
from svg_attention.planning.probes import probe_means

NAMES = ("Wan 720p", "HunyuanVideo 720p")
PASSES = ((16, False), (32, False), (32, True), (16, True))
DENSITY = 0.10
ERROR: dict[str, Any] = {"compensate": True, "route": "error"}
CALLS: dict[str, dict[str, Any]] = {
    "mass": {},
    "error": ERROR,
    "error, bias": {**ERROR, "correct_bias": True},
    "error, bias, 32-row probes": {**ERROR, "correct_bias": True, "probe_rows": 32},
    "error, bias, residual": {**ERROR, "correct_bias": True, "correct_residual": True},
    "error, bias, residual, 32-row probes": {
        **ERROR, "correct_bias": True, "correct_residual": True, "probe_rows": 32,
    },
    "error, bias, response metric": {**ERROR, "correct_bias": True, "metric": "response"},
}  # fmt: skip


def name_of(rows: int, outputs: bool, backend: str) -> str:
    """Return the label of a pass."""
    return f"{rows}-row probes{', outputs' if outputs else ''}, {backend}"


def check(operands: Sequence[Tensor], rows: int, length: int) -> dict[str, float]:
    """Compare the compiled pass with fp64 on the first and the last tile of two heads.

    Raises:
        RuntimeError: if errors, biases or outputs are off by more than rounding to bf16 explains.
    """
    found = probe_sums(
        *operands, length=length, probe_rows=rows, scale=HEAD_DIM**-0.5, return_output=True
    )
    probes = 128 // rows
    worst = {"error": 0.0, "bias": 0.0, "output": 0.0}
    for head in (0, operands[0].shape[1] - 1):
        for tile in (0, length // 128 - 1):
            part = slice(tile * probes, (tile + 1) * probes)
            mine = [x[:, head : head + 1] for x in operands]
            mine[0] = mine[0][:, :, part]
            wide = [x.float() if x.is_floating_point() else x for x in mine]
            want = svg_kernels.probe_sums(
                *wide,
                length=128,
                probe_rows=rows,
                return_output=True,
                backend="reference",
            )
            got = [x[:, head : head + 1] for x in (found.error, found.bias)]
            largest = want.error.amax()
            error = ((got[0][:, :, tile] - want.error[:, :, 0]).abs().amax() / largest).item()
            seen = want.error[:, :, 0] > 1e-6 * largest
            bias = ((got[1][:, :, tile] - want.bias[:, :, 0]).abs() * seen).amax().item()
            output = 0.0
            if found.output is not None and want.output is not None:
                difference = found.output[:, head : head + 1, part] - want.output
                output = (difference.norm() / want.output.norm()).item()
            for key, value in (("error", error), ("bias", bias), ("output", output)):
                worst[key] = max(worst[key], value)
    if worst["error"] > 1e-2 or worst["bias"] > 3e-2 or worst["output"] > 5e-3:
        raise RuntimeError(f"probes of {rows} rows are off: {worst}")
    return worst


def operands_of(call: AttentionCall, found: tuple[Clusters, Clusters], rows: int) -> list[Tensor]:
    """Return what a pass works on."""
    query, key, value = (call.video(x) for x in (call.query, call.key, call.value))
    means = probe_means(query, found[0].order, probe_rows=rows)
    keys = found[1]
    return [means, key, value, keys.order, keys.centroids, mean_values(value, keys), keys.sizes]


def measure(work: Workload, samples: int) -> dict[str, Any]:
    """Check and time one workload."""
    tensors, memory = structured(work), LayerMemory()
    queries, keys = work.clusters
    options: dict[str, Any] = {"q_clusters": queries, "k_clusters": keys, "density": DENSITY}
    draw = torch.Generator(device="cuda").manual_seed(0)
    call = AttentionCall(
        query=tensors[0], key=tensors[1], value=tensors[2], layout=work.layout, memory=memory,
        generator=draw,
    )  # fmt: skip
    SVG2(**options).cluster(call)
    found = SVG2(**options).cluster(call)
    length = work.layout.video_tokens
    functions: dict[str, Callable[[], Any]] = {}
    checks: dict[int, dict[str, float]] = {}
    tera: dict[str, float] = {}
    for rows, outputs in PASSES:
        operands = operands_of(call, found, rows)
        checks[rows] = check(operands, rows, length)
        work_done = 2 * work.heads * operands[0].shape[2] * length * HEAD_DIM * (1 + outputs) / 1e12
        for backend in ("cuda", "triton"):
            name = name_of(rows, outputs, backend)
            tera[name] = work_done

            def one(
                operands: list[Tensor] = operands, rows: int = rows, outputs: bool = outputs,
                backend: str = backend,
            ) -> Any:  # fmt: skip
                return probe_sums(
                    *operands, length=length, probe_rows=rows, scale=HEAD_DIM**-0.5,
                    return_output=outputs, backend=backend,
                )  # fmt: skip

            functions[name] = one
    passes = {n: summary(t) for n, t in interleave(functions, samples=samples, warmup=1).items()}
    calls: dict[str, Callable[[], Any]] = {}
    gigabytes = {}
    for name, changes in CALLS.items():
        method = SVG2(**{**options, **changes})

        def whole(method: SVG2 = method) -> Tensor:
            kept = LayerMemory(
                query_centroids=memory.query_centroids, key_centroids=memory.key_centroids
            )
            plan = method.plan(*tensors, layout=work.layout, memory=kept)
            return sparse_attention(*tensors, plan)

        gigabytes[name] = scratch(whole)
        graph, _ = capture(whole)
        calls[name] = graph.replay
    times = {n: summary(t) for n, t in interleave(calls, samples=samples, warmup=1).items()}
    return {
        "workload": work.name,
        "tokens": work.layout.tokens,
        "checks": checks,
        "pass_ms": passes,
        "pass_tflop": tera,
        "call_ms": times,
        "call_scratch_gb": gigabytes,
    }


def write(rows: Sequence[dict[str, Any]]) -> str:
    """Return the tables of passes and of whole calls in a graph."""
    head = ["milliseconds (TFLOP/s)", *(row["workload"] for row in rows)]
    passes = [
        [
            name,
            *(
                f"{row['pass_ms'][name]['median']:.2f} "
                f"({row['pass_tflop'][name] / row['pass_ms'][name]['median'] * 1e3:.0f})"
                for row in rows
            ),
        ]
        for name in rows[0]["pass_ms"]
    ]
    calls = [
        [name, *(f"{row['call_ms'][name]['median']:.2f}" for row in rows)]
        for name in rows[0]["call_ms"]
    ]
    first = f"SVG2 at {DENSITY:.0%}, ms in a graph"
    return table(head, passes) + "\n" + table([first, *head[1:]], calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--gpu", default="h100", help="name of the folder of results")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--commit", help="the commit, where this is no checkout")
    arguments = parser.parse_args()
    path = RESULTS / arguments.gpu / "probe_sums.json"
    if arguments.action == "run":
        rows = []
        for work in WORKLOADS:
            if work.name in NAMES and work.clusters == (300, 1000):
                with torch.inference_mode():
                    rows.append(measure(work, arguments.samples))
                gc.collect()
                torch.cuda.empty_cache()
        store(path, {"environment": environment(arguments.commit), "rows": rows})
    found = load(arguments.gpu, "probe_sums")
    print(conditions(found["environment"]))
    print(write(found["rows"]))


if __name__ == "__main__":
    main()
