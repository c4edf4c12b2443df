"""Measure the memory-bound operations of svg-kernels against diffusers and torch.

    python benchmarks/bench_ops.py run --output benchmarks/results/h100
    python benchmarks/bench_ops.py run --ops fp8 quantize residual_norm --name ops_fp8
    python benchmarks/bench_ops.py table

`run` checks each operation first and measures only what is right. `table` fills `docs/kernels.md`
from the stored result.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _harness import (
    RESULTS,
    ROOT,
    conditions,
    copy_bandwidth,
    environment,
    interleave,
    load,
    replace_between,
    store,
    summary,
    table,
)
from _op_cases import APART, Case, angles, cases, missing, randn

import svg_kernels

# Speed-ups over diffusers that the README of Sparse VideoGen 2 prints for its own kernels.
PRINTED_ROPE = {
    "1x32x1024x64": 9.21,
    "1x32x4096x64": 14.63,
    "1x32x16384x64": 19.63,
    "4x32x1024x64": 17.24,
    "4x32x4096x64": 19.85,
    "4x32x16384x64": 20.00,
}
PRINTED = {
    "rms_norm 2097152x32": 5.35,
    "rms_norm 1048576x64": 4.12,
    "rms_norm 524288x128": 3.48,
    "rms_norm 262144x256": 3.21,
    "layer_norm 2097152x32": 17.64,
    "layer_norm 1048576x64": 8.83,
    "layer_norm 524288x128": 4.06,
    "layer_norm 262144x256": 2.29,
    **{f"rope {shape}": ratio for shape, ratio in PRINTED_ROPE.items()},
    # Theirs takes query and key together.
    **{f"rope q, k of {shape}": ratio for shape, ratio in PRINTED_ROPE.items()},
}
PEERS = ("torch", "torch.compile", "FlashInfer", "QuACK")
# Share of the copy bandwidth that counts as done.
AIMS = {"rope": 0.80, "qk_norm_rope": 0.80, "permute_rows": 0.75, "unpermute_rows": 0.75}
NORM_AIM = 0.85


def run(
    output: Path, samples: int, compiled: bool, commit: str | None, ops: list[str], name: str
) -> None:
    """Check and measure the cases whose operation has one of some words in it; store them."""
    torch.manual_seed(0)
    copy = copy_bandwidth()
    print(f"copy {copy:.0f} GB/s", flush=True)
    rows = []
    with torch.no_grad():
        calls = host_time()
        print(calls, flush=True)
        for case in cases(compiled):
            if not ops or any(word in case.op for word in ops):
                rows.append(measure(case, samples, copy))
            del case
            torch.cuda.empty_cache()
    if not rows:
        raise SystemExit(f"no operation has one of {', '.join(ops)} in its name; nothing is stored")
    result = {
        "environment": environment(commit),
        "copy_gb_s": copy,
        "rows": rows,
        "missing": missing,
        "host_us_per_call": calls,
    }
    store(output / f"{name}.json", result)


def measure(case: Case, samples: int, copy: float) -> dict[str, Any]:
    """Check a case, time it and its peers in turn, and print a line."""
    for got, want in case.checks():
        torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2)
    times = interleave({"ours": case.ours, **case.peers}, samples=samples)
    ms = {name: summary(values) for name, values in times.items()}
    ours = ms["ours"]["median"]
    ratios = (f"{name} {ms[name]['median'] / ours:.2f}x" for name in case.peers)
    share = case.bytes / ours / 1e6 / copy
    print(f"{case.op:20s} {case.shape:28s} {share:5.1%} of copy", *ratios, flush=True)
    return {"op": case.op, "shape": case.shape, "bytes": case.bytes, "ms": ms}


def host_time(calls: int = 500, rounds: int = 30) -> dict[str, float]:
    """Measure what a call costs the host in microseconds, beside operators that do nothing.

    One is registered by the shortest way there is, one by `torch.library.custom_op`. Takes turns,
    and the shortest of all rounds: what else the machine does only adds.
    """
    torch.library.define("svg_bench::empty", "(Tensor x) -> ()")
    torch.library.impl("svg_bench::empty", "default", lambda x: None)

    @torch.library.custom_op("svg_bench::empty_custom_op", mutates_args=())
    def empty_custom_op(x: torch.Tensor) -> None:
        return None

    x, weight = randn(4, 64), randn(64)
    tokens, one = randn(1, 4, 64), randn(1, 64)
    heads, other, tables = randn(1, 2, 4, 64), randn(1, 2, 4, 64), angles(4, 64)
    order = torch.arange(4, device="cuda", dtype=torch.int32)
    outs = (torch.empty_like(heads[:, :1]), torch.empty_like(heads[:, :1]))
    functions: dict[str, Callable[[], Any]] = {
        "empty operator": lambda: torch.ops.svg_bench.empty.default(x),
        "empty custom_op": lambda: empty_custom_op(x),
        "rms_norm": lambda: svg_kernels.rms_norm(x, weight),
        "layer_norm_modulate": lambda: svg_kernels.layer_norm_modulate(tokens, one, one),
        "gate_residual": lambda: svg_kernels.gate_residual(tokens, tokens, one),
        "rope, in place": lambda: svg_kernels.rope(heads, *tables, inplace=True),
        "rope of q and k, in place": lambda: svg_kernels.rope(
            (heads, other), *tables, inplace=True
        ),
        "qk_norm_rope": lambda: svg_kernels.qk_norm_rope(
            tokens, tokens, weight, weight, *tables, heads=1
        ),
        "qk_norm_rope, outputs given": lambda: svg_kernels.qk_norm_rope(
            tokens, tokens, weight, weight, *tables, heads=1, out=outs
        ),
        "permute_rows": lambda: svg_kernels.permute_rows(heads, order),
        "torch.nn.functional.layer_norm": lambda: F.layer_norm(x, (64,), weight),
    }
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            best[name] = min(best[name], mean_call(function, calls))
    return {name: round(seconds * 1e6, 2) for name, seconds in best.items()}


def mean_call(function: Callable[[], Any], calls: int) -> float:
    """Return the mean host time of a call, in seconds."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def write_table(gpu: str) -> None:
    """Fill the tables of `docs/kernels.md` from the stored result."""
    result = load(gpu, "ops")
    copy = result["copy_gb_s"]
    peers = [name for name in PEERS if any(name in row["ms"] for row in result["rows"])]
    head = [
        "operation",
        "shape, bf16",
        "ms (quartiles)",
        "GB/s",
        "of copy",
        "aim",
        "over diffusers",
        "SVG2 prints",
        *(f"over {name}" for name in peers),
    ]
    calls = result["host_us_per_call"]
    bases = ("empty operator", "empty custom_op")
    host = [
        [name, f"{us:.1f}", *(f"{us - calls[base]:+.1f}" for base in bases)]
        for name, us in calls.items()
    ]
    refused = "; ".join(f"{name}, {why}" for name, why in result.get("missing", {}).items())
    text = (
        f"{conditions(result['environment'])} A device-to-device copy moved {copy:,.0f} GB/s in "
        "the same run.\n\n"
        + table(head, [line(row, copy, peers) for row in result["rows"]])
        + (f"\nEmpty cells: {refused}.\n" if refused else "")
        + "\nHost time of one call:\n\n"
        + table(["call", "us", *(f"over an {base}" for base in bases)], host)
    )
    replace_between(ROOT / "docs" / "kernels.md", "ops", text)


def write_alone(gpu: str, name: str, peer: str) -> None:
    """Fill the table of operations that were measured by themselves, if they were."""
    if not (RESULTS / gpu / f"{name}.json").exists():
        return
    result = load(gpu, name)
    copy = result["copy_gb_s"]
    head = ["operation", "shape, bf16", "ms (quartiles)", "GB/s", "of copy", f"over {peer}"]
    rows = [
        [op, shape, ms, speed, share, ratio]
        for op, shape, ms, speed, share, _, _, _, ratio in (
            line(row, copy, [peer]) for row in result["rows"]
        )
    ]
    text = (
        f"{conditions(result['environment'])} A device-to-device copy moved {copy:,.0f} GB/s in "
        "the same run.\n\n"
    )
    marker = name.replace("_", "-")
    replace_between(ROOT / "docs" / "kernels.md", marker, text + table(head, rows))


def write_variants(gpu: str) -> None:
    """Fill the table of what a sweep over cache hints and blocks found, if there was one."""
    if not (RESULTS / gpu / "ops_variants.json").exists():
        return
    result = load(gpu, "ops_variants")
    earlier = {(row["op"], row["shape"]): row for row in load(gpu, "ops")["rows"]}
    copy = load(gpu, "ops")["copy_gb_s"]
    head = ["operation", "shape, bf16", "now", "rows in flight", "no hints", "blocks"]

    def share(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.0%}" if name in row else ""

    rows = []
    for row in result["rows"]:
        first = earlier[row["op"], row["shape"]]
        now = first["bytes"] / first["ms"]["ours"]["median"] / 1e6 / copy
        names = ("hints", "no_hints", "final_blocks")
        shares = [share(row, name) for name in names]
        rows.append([f"`{row['op']}`", row["shape"], f"{now:.0%}", *shares])
    text = f"{conditions(result['environment'])} Shares of the copy bandwidth.\n\n"
    replace_between(ROOT / "docs" / "kernels.md", "ops-variants", text + table(head, rows))


def line(row: dict[str, Any], copy: float, peers: list[str]) -> list[str]:
    """Return one row of the table."""
    ms = row["ms"]
    ours = ms["ours"]["median"]
    speed = row["bytes"] / ours / 1e6
    printed = PRINTED.get(f"{row['op']} {row['shape']}")

    def ratio(peer: str) -> str:
        return f"{ms[peer]['median'] / ours:.1f}x" if peer in ms else ""

    return [
        f"`{row['op']}`",
        row["shape"],
        f"{ours:.3f} ({ms['ours']['q1']:.3f} to {ms['ours']['q3']:.3f})",
        f"{speed:,.0f}",
        f"{speed / copy:.0%}",
        aim(row),
        ratio("diffusers"),
        f"{printed:.2f}x" if printed else "",
        *map(ratio, peers),
    ]


def aim(row: dict[str, Any]) -> str:
    """Return the share aimed at; short sequences of `rope` are bound by the launch."""
    if row["op"] == "rope" and int(row["shape"].split("x")[2]) < 16384:
        return ""
    return f"{AIMS.get(row['op'], NORM_AIM):.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "h100")
    parser.add_argument("--gpu", default="h100", help="folder of the stored result")
    parser.add_argument("--ops", nargs="*", default=[], help="words in the names of operations")
    parser.add_argument("--name", default="ops", help="of the file that is written")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--commit", help="recorded where there is no git")
    args = parser.parse_args()
    if args.ops and args.name == "ops":
        parser.error("--ops measures a part, and ops.json holds all; give the file a --name")
    if args.action == "run":
        run(args.output, args.samples, not args.no_compile, args.commit, args.ops, args.name)
    else:
        write_table(args.gpu)
        write_alone(args.gpu, "ops_decoder", "diffusers")
        write_alone(args.gpu, "ops_fp8", APART)
        write_variants(args.gpu)


if __name__ == "__main__":
    main()
