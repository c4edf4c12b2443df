"""Whole self-attention calls of SVG1 and SVG2: their parts, their scratch, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import _sparse_peers as peers
import torch
from _harness import interleave, summary, table
from _sparse_workloads import Workload, dense
from torch import Tensor

import svg_kernels
from svg_attention import SVG1, SVG2, LayerMemory, SparsePlan, sparse_attention
from svg_attention.methods.call import AttentionCall
from svg_attention.planning.clustering import Clusters, cluster_rows

Pair = tuple[Clusters, Clusters]
DENSITY = 0.25
BAND_DENSITY = 0.30
ROUNDS = 2
PARTS = ("k-means of queries", "k-means of keys", "plan", "permutation", "attention")


def recluster(
    work: Workload, tensors: Sequence[Tensor], memory: LayerMemory, side: int
) -> Clusters:
    """Cluster the queries (0) or keys (1) again from remembered centroids."""
    known = (memory.query_centroids, memory.key_centroids)[side]
    video = slice(work.layout.video_start, work.layout.video_start + work.layout.video_tokens)
    return cluster_rows(
        tensors[side][:, :, video],
        work.clusters[side],
        remembered=known,
        iterations=(50, ROUNDS),
        generator=None,
    )


def clusters(work: Workload, tensors: Sequence[Tensor], memory: LayerMemory) -> Pair:
    """Return the clusters of queries and of keys."""
    return recluster(work, tensors, memory, 0), recluster(work, tensors, memory, 1)


def svg2(work: Workload) -> SVG2:
    """Return the method that is measured."""
    queries, keys = work.clusters
    return SVG2(q_clusters=queries, k_clusters=keys, density=DENSITY, step_iterations=ROUNDS)


def whole(
    method: SVG1 | SVG2, work: Workload, tensors: Sequence[Tensor], memory: LayerMemory
) -> Tensor:
    """Plan and attend; the memory stays as it is, so that every call does the same."""
    query, key, value = tensors
    kept = LayerMemory(query_centroids=memory.query_centroids, key_centroids=memory.key_centroids)
    plan = method.plan(query, key, value, layout=work.layout, memory=kept)
    return sparse_attention(query, key, value, plan)


def parts(
    work: Workload, tensors: Sequence[Tensor], memory: LayerMemory, found: Pair
) -> dict[str, Callable[[], Any]]:
    """Return the parts of an SVG2 call, each on what the part before it left."""
    method = svg2(work)
    query, key, value = tensors

    def plan() -> SparsePlan:
        asked = AttentionCall(query=query, key=key, value=value, layout=work.layout)
        return method.plan_clusters(asked, *found)

    made = plan()
    moved = svg_kernels.permute_rows((key, value), made.key_order)

    def attend() -> Tensor:
        return svg_kernels.block_sparse_attention(
            query,
            *moved,
            made.run_starts,
            made.run_lengths,
            query_order=made.query_order,
            tile_order=made.tile_order.flatten(),
        )

    functions = (
        lambda: recluster(work, tensors, memory, 0),
        lambda: recluster(work, tensors, memory, 1),
        plan,
        lambda: svg_kernels.permute_rows((key, value), made.key_order),
        attend,
    )
    return dict(zip(PARTS, functions, strict=True))


def scratch(function: Callable[[], Tensor]) -> float:
    """Return the most memory a call takes beside its inputs and its output, in GB."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return (peak - out.numel() * out.element_size()) / 1e9


def capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a call in one CUDA graph; return it and where its output lands."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph, out


def check_graph(
    graph: torch.cuda.CUDAGraph, out: Tensor, call: Callable[[], Tensor], tensors: Sequence[Tensor]
) -> None:
    """Replay a graph with new data and raise RuntimeError unless an eager call gives the same."""
    kept = [x.clone() for x in tensors]
    for x in tensors:
        x.copy_(x.roll(1, dims=1) * 0.9)
    out.fill_(torch.nan)
    graph.replay()
    replayed = out.clone()
    same = torch.equal(replayed, call())
    for x, old in zip(tensors, kept, strict=True):
        x.copy_(old)
    if not same:
        raise RuntimeError("a replayed graph and an eager call on the same data differ")


def measure(
    work: Workload,
    tensors: Sequence[Tensor],
    memory: LayerMemory,
    found: Pair,
    samples: int,
    missing: dict[str, str],
    kmeans: Any,
) -> list[dict[str, Any]]:
    """Time whole calls and their parts beside dense attention."""
    if work.clusters[0] == 100 and work.name == "Wan 720p":
        return []
    methods: dict[str, SVG1 | SVG2] = {
        "SVG2": svg2(work),
        "SVG1": SVG1(density=BAND_DENSITY),
    }
    functions: dict[str, Callable[[], Any]] = {}
    result: dict[str, Any] = {"workload": work.name, "tokens": work.layout.tokens, "scratch_gb": {}}
    for name, method in methods.items():

        def call(method: SVG1 | SVG2 = method) -> Tensor:
            return whole(method, work, tensors, memory)

        result["scratch_gb"][name] = scratch(call)
        functions[f"{name} call"] = call
    graph, out = capture(functions["SVG2 call"])
    check_graph(graph, out, functions["SVG2 call"], tensors)
    functions["SVG2 graph"] = graph.replay
    functions |= parts(work, tensors, memory, found)
    # The difference is what launching the plan's operations one by one costs.
    plan_graph, _ = capture(functions["plan"])
    functions["plan graph"] = plan_graph.replay
    functions["cuDNN dense"] = lambda: dense(*tensors)
    if kmeans is not None and not work.layout.text_tokens and "FlashInfer" not in missing:
        functions["FlashInfer + flash-kmeans call"] = peers.prepare_call(
            kmeans, tuple(tensors), found, work.clusters, DENSITY
        )
    times = interleave(functions, samples=samples, warmup=1)
    result["ms"] = {name: summary(values) for name, values in times.items()}
    return [result]


def write(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of whole calls."""
    names = [
        "SVG2 call",
        "SVG2 graph",
        *PARTS,
        "plan graph",
        "FlashInfer + flash-kmeans call",
        "SVG1 call",
        "cuDNN dense",
    ]

    def cell(row: dict[str, Any], name: str) -> str:
        return f"{row['ms'][name]['median']:.2f}" if name in row["ms"] else ""

    head = ["milliseconds", *(row["workload"] for row in rows)]
    lines = [[name, *(cell(row, name) for row in rows)] for name in names]
    lines = [line for line in lines if any(line[1:])]
    for name in ("SVG2", "SVG1"):
        lines.append(
            [f"scratch of {name}, GB", *(f"{row['scratch_gb'][name]:.2f}" for row in rows)]
        )
    for call in ("SVG2 call", "SVG1 call"):
        ratio = [row["ms"]["cuDNN dense"]["median"] / row["ms"][call]["median"] for row in rows]
        lines.append([f"cuDNN dense / {call}", *(f"{r:.2f}" for r in ratio)])
    return table(head, lines)


def brief(rows: Sequence[dict[str, Any]]) -> str:
    """Return what whole calls take beside dense attention, and how many times faster they are."""
    names = ("FlashInfer + flash-kmeans call", "SVG2 call", "SVG1 call")
    head = ["milliseconds a call", "cuDNN dense", *(f"{name} (times faster)" for name in names)]

    def cell(ms: dict[str, Any], name: str) -> str:
        if name not in ms:
            return ""
        time = ms[name]["median"]
        return f"{time:.1f} ({ms['cuDNN dense']['median'] / time:.2f})"

    return table(
        [x.replace(" call (", " (") for x in head],
        [
            [
                f"{row['workload']}, {row['tokens']:,} tokens",
                f"{row['ms']['cuDNN dense']['median']:.1f}",
                *(cell(row["ms"], name) for name in names),
            ]
            for row in rows
        ],
    )
