"""The figures of the sparse attention page, drawn from stored results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from _sparse_calls import PARTS

TITLES = {
    "cuda": "svg_kernels, sm_90a",
    "triton": "svg_kernels, Triton",
    "FlashInfer": "FlashInfer fa3, variable clusters",
    "FlashAttention 4": "FlashAttention 4, 128 x 128 blocks",
    "FastVideo": "FastVideo, 64 x 64 blocks",
    "cuDNN dense": "cuDNN, dense",
}


def draw(
    result: dict[str, Any], speed: Callable[[dict[str, Any]], dict[str, float]], folder: Path
) -> None:
    """Draw `sparse-speed.png` and `sparse-call.png` into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = [row for row in result["rows"] if row["workload"] == result["rows"][0]["workload"]]
    first = [row for row in first if row["clusters"] == first[0]["clusters"]]
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for name, title in TITLES.items():
        points = sorted(
            (100 * row["densities"][name], speed(row)[name])
            for row in first
            if name in row["ms"] and name in row["densities"]
        )
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=title)
    axis.set(
        xlabel="density, %",
        ylabel="effective TFLOP/s",
        title=f"{first[0]['workload']}, bf16, {result['environment']['gpu']}",
        xscale="log",
        ylim=(0, None),
    )
    axis.set_xticks([10, 15, 25, 40, 100], ["10", "15", "25", "40", "100"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "sparse-speed.png", dpi=130)
    plt.close(figure)
    draw_parts(result, folder / "sparse-call.png")


def draw_parts(result: dict[str, Any], target: Path) -> None:
    """Stack the parts of each whole call beside dense attention and the peers' call."""
    import matplotlib.pyplot as plt

    rows = result["calls"]
    figure, axis = plt.subplots(figsize=(7, 1.4 + 1.1 * len(rows)))
    names, place = [], 0
    for row in reversed(rows):
        ms = {name: row["ms"][name]["median"] for name in row["ms"]}
        for name in ("cuDNN dense", "FlashInfer + flash-kmeans call", "SVG1 call"):
            if name in ms:
                axis.barh(place, ms[name], color="lightgrey")
                names.append(f"{row['workload']}: {name}")
                place += 1
        left = 0.0
        for index, part in enumerate(PARTS):
            label = part if row is rows[0] else None
            axis.barh(place, ms[part], left=left, color=f"C{index}", label=label)
            left += ms[part]
        names.append(f"{row['workload']}: SVG2 call")
        place += 1.5
    ticks = [bar.get_y() + bar.get_height() / 2 for bar in axis.patches]
    axis.set_yticks(sorted(set(ticks)), names, fontsize=8)
    axis.set(xlabel=f"milliseconds on {result['environment']['gpu']}")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=130)
    plt.close(figure)
