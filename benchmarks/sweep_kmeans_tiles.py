"""Time the assign kernels of flash-kmeans tile by tile, and the kernels of its update.

This is how rows of `flash_kmeans.launch_config.TABLE` are chosen: run it on a GPU with
`--out benchmarks/results/<gpu>/kmeans_tiles.json`, then `tables_kmeans.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import _harness

from flash_kmeans.triton import launch, launch_config

SHAPES = ((40, 75_600, 128, 1000), (40, 75_600, 128, 300), (1, 1 << 20, 128, 4096))
WIDE = ((8, 65_536, 256, 512),)


def tile(block_n: int, block_k: int, warps: int, stages: int, block_d: int) -> launch_config.Tile:
    """Return a row of the table."""
    return launch_config.Tile(
        block_n=block_n, block_k=block_k, block_d=block_d, warps=warps, stages=stages
    )


def candidates(dim: int) -> list[launch_config.Tile]:
    """Return the rows to try for a width."""
    if dim == 128:
        rows = [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 2), (64, 128, 4, 2)]
        rows += [(128, 128, 4, 2), (256, 128, 8, 2)]
    else:
        rows = [(64, 64, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2)]
    return [tile(*row, dim) for row in rows]


def variants(x: Tensor, start: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return callables that label `x` with every candidate, and the warp-specialised kernel."""

    def with_tile(row: launch_config.Tile) -> Tensor:
        chosen, launch_config.tile_for = launch_config.tile_for, lambda *_: row
        try:
            return launch.assign(x, start, "euclidean", specialised=False)
        finally:
            launch_config.tile_for = chosen

    calls: dict[str, Callable[[], Tensor]] = {
        f"{t.block_n} x {t.block_k}, {t.warps} warps, {t.stages} stages": lambda t=t: with_tile(t)
        for t in candidates(x.shape[2])
    }
    if launch.suits_hopper(x, start.shape[1], "euclidean"):
        calls["warp-specialised"] = lambda: launch.assign(x, start, "euclidean")
    return calls


def update_kernels(x: Tensor, start: Tensor) -> dict[str, float]:
    """Return microseconds per kernel of one update."""
    labels = launch.assign(x, start, "euclidean")
    runs = 5
    launch.update(x, labels, start, "euclidean", None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(runs):
            launch.update(x, labels, start, "euclidean", None)
        torch.cuda.synchronize()
    found = ((e.key, e.device_time_total / runs) for e in profile.key_averages())
    return {name: round(time, 1) for name, time in found if time > 0}


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for batch, points, dim, clusters in SHAPES + WIDE:
        x = torch.randn(batch, points, dim, device="cuda", dtype=torch.bfloat16)
        start = x[:, :clusters].contiguous()
        calls = variants(x, start)
        labels = {name: call() for name, call in calls.items()}
        first = next(iter(labels.values()))
        differing = {name: int((value != first).sum()) for name, value in labels.items()}
        times = _harness.interleave(calls, samples=7)
        for name, values in times.items():
            milliseconds = _harness.summary(values)
            rate = 2 * batch * points * dim * clusters / milliseconds["median"] / 1e9
            shape = {"batch": batch, "points": points, "dim": dim, "clusters": clusters}
            rows.append(
                {**shape, "variant": name, "ms": milliseconds, "tflops": round(rate)}
                | {"labels_that_differ": differing[name]}
            )
            print(rows[-1], flush=True)
    x = torch.randn(*SHAPES[0][:3], device="cuda", dtype=torch.bfloat16)
    result = {
        "environment": _harness.environment(options.commit),
        "table": {
            str(c): [asdict(t) for t in rows.values()] for c, rows in launch_config.TABLE.items()
        },
        "assign": rows,
        "update_us": update_kernels(x, x[:, : SHAPES[0][3]].contiguous()),
        "update_bytes": x.numel() * x.element_size(),
    }
    _harness.store(options.out, result)


if __name__ == "__main__":
    main()
