"""Sparse attention beside dense attention on a CPU: the attention alone, and whole SVG2 calls.

As a script it measures and stores: `bench_sparse_attention_cpu.py --out FILE`; `--tables` fills
`docs/methods.md` from what is stored. Under pytest-benchmark it times the same four callables.

Callables take turns and every row reports the median with both quartiles of the elapsed time, and
the processor time of all threads, which other work on the machine disturbs less. The result is
checked against the plan's own mask before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import _harness

from svg_attention import SVG2, LayerMemory, SparsePlan, TokenLayout, recall, sparse_attention

LAYOUT = TokenLayout(grid=(13, 32, 32))
HEADS, HEAD_DIM = 4, 64
METHOD = SVG2(q_clusters=104, k_clusters=208, density=0.25, first_iterations=10)
STORED = ("cpu", "sparse_attention")
PAGE = _harness.ROOT / "docs" / "methods.md"
MARK = "sparse attention on a CPU"


def structured(seed: int = 0, groups: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values in which a query attends mostly to its own hidden group."""
    draw = torch.Generator().manual_seed(seed)
    shape = (1, HEADS, LAYOUT.tokens, HEAD_DIM)
    centres = F.normalize(torch.randn(HEADS, groups, HEAD_DIM, generator=draw), dim=-1)
    label = torch.randint(groups, shape[:3], generator=draw)
    base = 8.5 * centres[torch.arange(HEADS)[None, :, None], label]
    noise = torch.randn(3, *shape, generator=draw)
    return base + 0.5 * noise[0], base + 0.5 * noise[1], noise[2]


class Case:
    """One attention call after the first step: what is timed, on which data."""

    def __init__(self) -> None:
        self.data = structured()
        self.memory = LayerMemory()
        self.generator = torch.Generator().manual_seed(0)
        self.plan = self.make_plan()

    def make_plan(self) -> SparsePlan:
        """Plan as every step but the first does: from remembered centroids."""
        return METHOD.plan(*self.data, layout=LAYOUT, memory=self.memory, generator=self.generator)

    def functions(self) -> dict[str, Callable[[], Any]]:
        """Return the callables to compare by name."""
        return {
            "dense": lambda: F.scaled_dot_product_attention(*self.data),
            "plan": self.make_plan,
            "attention": lambda: sparse_attention(*self.data, self.plan),
            "whole call": lambda: sparse_attention(*self.data, self.make_plan()),
        }

    def check(self) -> float:
        """Compare sampled heads with attention under the plan's mask; return the largest error."""
        query, key, value = (x[:, :1] for x in self.data)
        mask = self.plan.to_mask()[:, :1]
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        found = sparse_attention(*self.data, self.plan)[:, :1]
        error = float((found - expected).abs().max())
        if not error < 1e-4:
            raise RuntimeError(f"wrong result: error {error:.2e}; nothing was timed")
        return error


@pytest.fixture(scope="module")
def case() -> Case:
    made = Case()
    made.check()
    return made


@pytest.mark.parametrize("name", ["dense", "plan", "attention", "whole call"])
def test_call(benchmark: Any, case: Case, name: str) -> None:
    benchmark.extra_info["density"] = float(case.plan.density().mean())
    benchmark.pedantic(case.functions()[name], rounds=3, warmup_rounds=1)


def measure(samples: int, threads: int) -> dict[str, Any]:
    """Time the callables in turn; return elapsed and processor seconds with the conditions."""
    torch.set_num_threads(threads)
    case = Case()
    error = case.check()
    functions = case.functions()
    elapsed: dict[str, list[float]] = {name: [] for name in functions}
    busy: dict[str, list[float]] = {name: [] for name in functions}
    for sample in range(samples + 1):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            if sample:  # The first turn warms up.
                elapsed[name].append(time.perf_counter() - wall)
                busy[name].append(time.process_time() - cpu)
    return {
        "environment": {
            "cpu": cpu_name(),
            "threads": threads,
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": subprocess.run(
                ["git", "-C", str(_harness.ROOT), "rev-parse", "--short", "HEAD"],
                capture_output=True,
                text=True,
                check=False,
            ).stdout.strip(),
            "date": datetime.now(timezone.utc).date().isoformat(),
        },
        "tokens": LAYOUT.tokens,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "method": METHOD.to_dict(),
        "density": float(case.plan.density().mean()),
        "recall": float(recall(*case.data[:2], case.plan, rows=torch.arange(0, 13_312, 97)).mean()),
        "largest_error": error,
        "elapsed_seconds": {name: _harness.summary(times) for name, times in elapsed.items()},
        "processor_seconds": {name: _harness.summary(times) for name, times in busy.items()},
    }


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def tables() -> None:
    """Write the stored result into the documentation."""
    result = _harness.load(*STORED)
    env, rows = result["environment"], []
    dense = {
        kind: result[kind]["dense"]["median"] for kind in ("elapsed_seconds", "processor_seconds")
    }
    labels = {
        "dense": "dense, torch's `scaled_dot_product_attention`",
        "attention": "sparse, a plan given",
        "plan": "planning alone (k-means from the step before, choice, runs)",
        "whole call": "sparse, planning included",
    }
    for name, label in labels.items():
        cells = [label]
        for kind, base in dense.items():
            times = result[kind][name]
            cells.append(f"{times['median']:.2f} ({times['q1']:.2f} to {times['q3']:.2f})")
            cells.append("" if name == "plan" else f"{base / times['median']:.1f}")
        rows.append(cells)
    head = ["call", "elapsed, s", "times faster", "processor time, s", "times faster"]
    text = (
        f"{result['tokens']:,} tokens, {result['heads']} heads of {result['head_dim']}, fp32, "
        f"density {result['density']:.3f}, recall {result['recall']:.3f}; median and quartiles. "
        f"{env['cpu']}, {env['threads']} of {env['cores']} cores, load {env['load']:.1f}, "
        f"torch {env['torch']}, commit {env['commit']}, {env['date']}.\n\n"
    )
    _harness.replace_between(PAGE, MARK, text + _harness.table(head, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="measure and store the result here")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", action="store_true", help="fill docs/methods.md")
    options = parser.parse_args()
    if options.out:
        _harness.store(options.out, measure(options.samples, options.threads))
    if options.tables:
        tables()


if __name__ == "__main__":
    main()
