"""Measure block-sparse attention on a GPU: kernels beside their peers, and whole calls.

    python benchmarks/bench_sparse_attention.py run --gpu h100
    python benchmarks/bench_sparse_attention.py table --gpu h100

`run` checks sampled rows against fp64 before it times anything; callables take turns, each with a
cold L2. Speeds are effective: `4 * heads * tokens^2 * head_dim * density / time`, where density
counts the pairs that are really computed. `table` fills `docs/sparse-attention-kernel.md` and draws
its figures.

Data is structured, not noise, so that clusters are what they are in a video model: queries and
keys are `cos(F p + phase)` of each token's place `p` in the clip, with random frequencies `F` for
each head and channel, plus noise; clusters come from 50 rounds of our k-means on them. Peers read
what is nearest to our plan in their own terms: FlashInfer the clusters that each query cluster's
centroid ranks highest, FlashAttention 4 and FastVideo the fixed blocks whose means do, all on rows
sorted by cluster, text left out. Peers that are not installed are listed as not run.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _sparse_calls as calls
import _sparse_figures as figures
import _sparse_peers as peers
import torch
from _harness import (
    RESULTS,
    ROOT,
    UNAVAILABLE,
    conditions,
    environment,
    interleave,
    load,
    reason,
    replace_between,
    store,
    summary,
    table,
)
from _sparse_workloads import HEAD_DIM, WORKLOADS, Workload, check_plan, dense, structured
from torch import Tensor

import svg_kernels
from svg_attention import SVG2, LayerMemory, SparsePlan
from svg_attention.methods.call import AttentionCall

DENSITIES = (0.10, 0.15, 0.25, 0.40, 1.0)
PAGE = ROOT / "docs" / "sparse-attention-kernel.md"
README = ROOT / "packages" / "svg-attention" / "README.md"
PEERS = ("FlashInfer", "FlashAttention 4", "FastVideo")
COLUMNS = ("cuda", "triton", "FlashInfer", "FlashInfer plan", *PEERS[1:], "cuDNN dense")


def kernels(
    query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan
) -> dict[str, Callable[[], Tensor]]:
    """Return our kernels, each on one plan and keys already in its order."""
    if plan.key_order is not None:
        key, value = svg_kernels.permute_rows((key, value), plan.key_order)
    first = None if plan.tile_order is None else plan.tile_order.flatten()
    device = query.device

    def kernel(backend: str) -> Callable[[], Tensor]:
        return lambda: svg_kernels.block_sparse_attention(
            query,
            key,
            value,
            plan.run_starts,
            plan.run_lengths,
            query_order=plan.query_order,
            tile_order=first,
            backend=backend,
        )

    unsupported = svg_kernels.attention.unsupported
    names = [n for n in ("cuda", "triton") if unsupported(n, device, query.dtype, HEAD_DIM) is None]
    return {name: kernel(name) for name in names}


def measure(
    work: Workload, samples: int, missing: dict[str, str], kmeans: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Time one workload at every density, and its whole calls."""
    tensors = structured(work)
    memory = LayerMemory()
    draw = torch.Generator(device="cuda").manual_seed(0)
    first = SVG2(q_clusters=work.clusters[0], k_clusters=work.clusters[1], density=0.25)
    first.plan(*tensors, layout=work.layout, memory=memory, generator=draw)
    clusters = calls.clusters(work, tensors, memory)
    rows = []
    for density in DENSITIES:
        row = measure_density(work, density, tensors, clusters, samples, missing)
        rows.append(row)
        text = {n: round(s) for n, s in speed(row).items()}
        print(work.name, work.clusters, density, text, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    whole = calls.measure(work, tensors, memory, clusters, samples, missing, kmeans)
    for call in whole:
        print(work.name, call, flush=True)
    return rows, whole


def measure_density(
    work: Workload,
    density: float,
    tensors: tuple[Tensor, ...],
    clusters: calls.Pair,
    samples: int,
    missing: dict[str, str],
) -> dict[str, Any]:
    """Time the kernels and their peers at one density."""
    method = SVG2(q_clusters=work.clusters[0], k_clusters=work.clusters[1], density=density)
    if density < 1.0:
        query, key, value = tensors
        call = AttentionCall(query=query, key=key, value=value, layout=work.layout)
        plan = method.plan_clusters(call, *clusters)
    else:
        plan = method.plan(*tensors, layout=work.layout, memory=LayerMemory())
    functions: dict[str, Callable[[], Any]] = dict(kernels(*tensors, plan))
    for name, function in functions.items():
        check_plan(name, *tensors, plan, function())
    shares = dict.fromkeys(functions, plan.density().mean().item())
    video = tuple(x[:, :, : work.layout.video_tokens] for x in tensors)
    for name in PEERS:
        try:
            prepared, share = prepare(name, video, clusters, density)
        except UNAVAILABLE as error:
            missing.setdefault(name, reason(error))
        else:
            functions |= prepared
            shares |= share
    if density >= 1.0:
        functions["cuDNN dense"] = lambda: dense(*tensors)
        shares["cuDNN dense"] = 1.0
    times = interleave(functions, samples=samples, warmup=1)
    used = plan.run_lengths > 0
    return {
        "workload": work.name,
        "tokens": work.layout.tokens,
        "heads": work.heads,
        "clusters": list(work.clusters),
        "data": "structured",
        "density": shares.get("cuda", density),
        "densities": shares,
        "mean_run": (plan.run_lengths.sum() / used.sum()).item(),
        "peer_tokens": work.layout.video_tokens,
        "ms": {name: summary(values) for name, values in times.items()},
    }


def prepare(
    name: str, tensors: tuple[Tensor, ...], clusters: calls.Pair, density: float
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Return what to time of one peer, empty where it has nothing for this density."""
    if name == "FlashInfer":
        if density > peers.DENSEST_TOKEN_LIST:
            return {}, {}
        return peers.prepare_flashinfer(*tensors, *clusters, density)
    if name == "FlashAttention 4":
        return peers.prepare_flash_attention(tensors, clusters, density)
    return ({}, {}) if density >= 1.0 else peers.prepare_fastvideo(tensors, clusters, density)


def speed(row: dict[str, Any]) -> dict[str, float]:
    """Return effective TFLOP/s of the kernels of a row."""
    found = {}
    for name, share in row.get("densities", dense_shares(row)).items():
        if name in row["ms"]:
            tokens = row.get("peer_tokens", 0) if name in PEERS else row["tokens"]
            flops = 4 * row["heads"] * tokens**2 * HEAD_DIM * share
            found[name] = flops / row["ms"][name]["median"] / 1e9
    return found


def dense_shares(row: dict[str, Any]) -> dict[str, float]:
    """Return the densities of the kernels of a row that was stored before there were peers."""
    return {"cuda": row["density"], "triton": row["density"], "cuDNN dense": 1.0}


def run(
    gpu: str, samples: int, commit: str | None, folder: Path | None, only: list[int] | None
) -> None:
    """Measure every workload; write `sparse_attention.json` after each."""
    missing: dict[str, str] = {}
    try:
        kmeans = peers.load(folder, "flash_kmeans") if folder else None
    except ImportError as error:
        kmeans, missing["flash-kmeans 0.3.1"] = None, reason(error)
    result: dict[str, Any] = {
        "environment": environment(commit),
        "samples": samples,
        "not_run": [],
        "rows": [],
        "calls": [],
    }
    with torch.no_grad():
        for work in [w for i, w in enumerate(WORKLOADS) if not only or i in only]:
            rows, whole = measure(work, samples, missing, kmeans)
            result["rows"] += rows
            result["calls"] += whole
            result["not_run"] = [f"{name}: {why}" for name, why in missing.items()]
            store(RESULTS / gpu / "sparse_attention.json", result)


def write_table(gpu: str) -> None:
    """Fill the tables of the kernel's page from the stored result, and draw its figures."""
    result = load(gpu, "sparse_attention")
    head = ["workload", "clusters", "density", "mean run", *COLUMNS]
    notes = [*result.get("notes", [])]
    if result["not_run"]:
        notes.append(f"Not run: {'; '.join(result['not_run'])}.")
    text = (
        f"{conditions(result['environment'])} Milliseconds and, in brackets, effective TFLOP/s.\n\n"
        + table(head, [line(row) for row in result["rows"]])
        + "\n"
        + "\n".join(notes)
    )
    replace_between(PAGE, "sparse attention kernels", text)
    if result.get("calls"):
        replace_between(PAGE, "whole calls", calls.write(result["calls"]))
        text = f"{conditions(result['environment'])}\n\n{calls.brief(result['calls'])}"
        replace_between(README, "whole calls", text)
        figures.draw(result, speed, ROOT / "docs" / "assets")


def line(row: dict[str, Any]) -> list[str]:
    """Return one row of the table."""
    speeds = speed(row)

    def cell(name: str) -> str:
        if name not in row["ms"]:
            return ""
        ms = f"{row['ms'][name]['median']:.1f}"
        return f"{ms} ({speeds[name]:.0f})" if name in speeds else ms

    return [
        f"{row['workload']}, {row['heads']} x {row['tokens']:,}",
        "{} x {}".format(*row["clusters"]),
        f"{row['density']:.1%}",
        f"{row['mean_run']:.0f}",
        *(cell(name) for name in COLUMNS),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--gpu", default="h100", help="folder of the stored result")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--commit", help="recorded where there is no git")
    parser.add_argument("--kmeans", type=Path, help="folder of the unpacked flash-kmeans 0.3.1")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the workloads, from 0")
    args = parser.parse_args()
    if args.action == "run":
        run(args.gpu, args.samples, args.commit, args.kmeans, args.only)
    else:
        write_table(args.gpu)


if __name__ == "__main__":
    main()
