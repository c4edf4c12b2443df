"""Measure block-sparse attention on a GPU: the kernels alone, and whole SVG2 calls.

    python benchmarks/bench_sparse_attention.py run --gpu h200
    python benchmarks/bench_sparse_attention.py table --gpu h200

`run` checks sampled tiles against fp64 before it times anything; callables take turns with cuDNN's
dense attention. Speeds are effective: `4 * heads * tokens^2 * head_dim * density / time`, where
density counts the rows that are really read. `table` fills `docs/sparse-attention-kernel.md`.

Data is structured, not noise, so that clusters are what they are in a video model: queries and
keys are `cos(F p + phase)` of each token's place `p` in the clip, with random frequencies `F` for
each head and channel, plus noise. Peers that are not installed are listed as not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _harness import (
    RESULTS,
    ROOT,
    conditions,
    environment,
    interleave,
    load,
    replace_between,
    store,
    summary,
    table,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import svg_kernels
from svg_attention import SVG2, LayerMemory, SparsePlan, TokenLayout, sparse_attention
from svg_attention.backends.kernels import long_tiles_first
from svg_kernels.attention.reference import read_mask

HEAD_DIM = 128
DENSITIES = (0.10, 0.15, 0.25, 0.40, 1.0)
PAGE = ROOT / "docs" / "sparse-attention-kernel.md"
PEERS = {
    "flashinfer": "FlashInfer",
    "flash_attn.cute": "FlashAttention 4",
    "fastvideo": "FastVideo",
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One model's self-attention."""

    name: str
    heads: int
    layout: TokenLayout
    clusters: tuple[int, int]


WORKLOADS = (
    Workload(
        name="Wan 720p", heads=40, layout=TokenLayout(grid=(21, 45, 80)), clusters=(300, 1000)
    ),
    Workload(
        name="HunyuanVideo 720p",
        heads=24,
        layout=TokenLayout(grid=(33, 45, 80), text_tokens=256),
        clusters=(300, 1000),
    ),
    Workload(name="Wan 480p", heads=40, layout=TokenLayout(grid=(21, 30, 52)), clusters=(100, 500)),
)


def structured(work: Workload, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, keys and values whose attention follows the place in the clip."""
    draw = torch.Generator(device="cuda").manual_seed(seed)
    layout = work.layout
    axes = [torch.arange(n, device="cuda") / n for n in layout.grid]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)
    shape = (1, work.heads, layout.tokens, HEAD_DIM)
    query, key, value = (
        torch.randn(shape, device="cuda", generator=draw).to(torch.bfloat16) for _ in range(3)
    )
    video = slice(layout.video_start, layout.video_start + layout.video_tokens)
    for head in range(work.heads):
        frequency = torch.randn(3, HEAD_DIM, device="cuda", generator=draw) * (2 + head % 8)
        phase = torch.rand(HEAD_DIM, device="cuda", generator=draw) * 2 * math.pi
        base = 1.5 * torch.cos(place @ frequency * math.pi + phase)
        for x in (query, key):
            x[0, head, video] = (base + 0.7 * x[0, head, video].float()).to(x.dtype)
    return query, key, value


def check(query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan, out: Tensor) -> None:
    """Compare sampled tiles with fp64."""
    for head in (0, plan.heads - 1):
        for tile in (0, plan.tiles // 2, plan.tiles - 1):
            rows = slice(tile * plan.tile_rows, (tile + 1) * plan.tile_rows)
            tokens = plan.query_order[0, head, rows].long()
            starts, lengths = (x[0, head, tile] for x in (plan.run_starts, plan.run_lengths))
            read = read_mask(starts, lengths, plan.key_length)
            keys = plan.key_order[0, head].long()[read]
            want = F.scaled_dot_product_attention(
                query[0, head, tokens][None].double(),
                key[0, head, keys][None].double(),
                value[0, head, keys][None].double(),
            )[0]
            error = (out[0, head, tokens].double() - want).norm() / want.norm()
            if not error < 5e-3:
                raise RuntimeError(f"head {head}, tile {tile}: relative error {error:.2e}")


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value)


def measure(work: Workload, samples: int) -> list[dict[str, Any]]:
    """Time one workload at every density."""
    query, key, value = structured(work)
    rows = []
    for density in DENSITIES:
        row = measure_density(work, density, query, key, value, samples)
        rows.append(row)
        speeds = {n: round(s) for n, s in speed(row).items()}
        print(work.name, density, f"mean run {row['mean_run']:.0f}", speeds, flush=True)
    return rows


def measure_density(
    work: Workload, density: float, query: Tensor, key: Tensor, value: Tensor, samples: int
) -> dict[str, Any]:
    """Time the kernels on one plan, and the whole call that builds it."""
    tokens = work.layout.tokens
    queries, keys = work.clusters
    # A budget that fills every tile makes a full list of runs, not a call to a dense kernel.
    method = SVG2(q_clusters=queries, k_clusters=keys, density=min(density, 0.9999))
    memory = LayerMemory()
    draw = torch.Generator(device="cuda").manual_seed(0)

    def planned() -> SparsePlan:
        return method.plan(query, key, value, layout=work.layout, memory=memory, generator=draw)

    plan = planned().rounded(8)
    moved_key, moved_value = svg_kernels.permute_rows((key, value), plan.key_order)
    first = long_tiles_first(plan.run_lengths)

    def kernel(backend: str) -> Callable[[], Tensor]:
        return lambda: svg_kernels.block_sparse_attention(
            query,
            moved_key,
            moved_value,
            plan.run_starts,
            plan.run_lengths,
            query_order=plan.query_order,
            tile_order=first,
            backend=backend,
        )

    functions = {name: kernel(name) for name in backends()}
    for function in functions.values():
        check(query, key, value, plan, function())
    functions["cudnn dense"] = lambda: dense(query, key, value)
    functions["plan"] = planned
    functions["call"] = lambda: sparse_attention(query, key, value, planned())
    times = interleave(functions, samples=samples, warmup=2)
    used = plan.run_lengths > 0
    return {
        "workload": work.name,
        "tokens": tokens,
        "heads": work.heads,
        "clusters": list(work.clusters),
        "data": "structured",
        "density": plan.density().mean().item(),
        "mean_run": (plan.run_lengths.sum() / used.sum()).item(),
        "ms": {name: summary(values) for name, values in times.items()},
    }


def backends() -> list[str]:
    """Return the kernels that run here."""
    device = torch.device("cuda", torch.cuda.current_device())
    return [
        name
        for name in ("cuda", "triton")
        if svg_kernels.attention.unsupported(name, device, torch.bfloat16, HEAD_DIM) is None
    ]


def missing_peers() -> list[str]:
    """Name the peers that are not installed here."""
    found = {n: importlib.util.find_spec(n.split(".")[0]) is not None for n in PEERS}
    return [title for name, title in PEERS.items() if not found[name]]


def speed(row: dict[str, Any]) -> dict[str, float]:
    """Return effective TFLOP/s of the kernels of a row."""
    dense_flops = 4 * row["heads"] * row["tokens"] ** 2 * HEAD_DIM
    work = {"cuda": row["density"], "triton": row["density"], "cudnn dense": 1.0}
    return {
        name: dense_flops * share / row["ms"][name]["median"] / 1e9
        for name, share in work.items()
        if name in row["ms"]
    }


def run(gpu: str, samples: int, commit: str | None) -> None:
    """Measure every workload; write `sparse_attention.json`."""
    with torch.no_grad():
        rows = [row for work in WORKLOADS for row in measure(work, samples)]
    result = {
        "environment": environment(commit),
        "samples": samples,
        "not_run": [f"{name}: not installed" for name in missing_peers()],
        "rows": rows,
    }
    store(RESULTS / gpu / "sparse_attention.json", result)


def write_table(gpu: str) -> None:
    """Fill the table of the kernel's page from the stored result."""
    result = load(gpu, "sparse_attention")
    head = ["workload", "data", "density", "mean run", "cuda", "triton", "cuDNN dense", "call"]
    notes = [*result.get("notes", []), f"Not run: {'; '.join(result['not_run'])}."]
    text = (
        f"{conditions(result['environment'])} Milliseconds and, in brackets, effective TFLOP/s.\n\n"
        + table(head, [line(row) for row in result["rows"]])
        + "\n"
        + "\n".join(notes)
    )
    replace_between(PAGE, "sparse attention kernels", text)


def line(row: dict[str, Any]) -> list[str]:
    """Return one row of the table."""
    speeds = speed(row)

    def cell(name: str) -> str:
        if name not in row["ms"]:
            return "not run"
        ms = f"{row['ms'][name]['median']:.1f}"
        return f"{ms} ({speeds[name]:.0f})" if name in speeds else ms

    return [
        f"{row['workload']}, {row['heads']} x {row['tokens']:,}",
        row["data"],
        f"{row['density']:.1%}",
        f"{row['mean_run']:.0f}",
        *(cell(name) for name in ("cuda", "triton", "cudnn dense", "call")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--gpu", default="h200", help="folder of the stored result")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--commit", help="recorded where there is no git")
    args = parser.parse_args()
    if args.action == "run":
        run(args.gpu, args.samples, args.commit)
    else:
        write_table(args.gpu)


if __name__ == "__main__":
    main()
