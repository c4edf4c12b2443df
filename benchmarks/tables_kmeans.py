"""Write the tables about k-means into the documentation, and draw its picture, from stored results.

`python benchmarks/tables_kmeans.py h100` reads of `kmeans_tiles.json` and `kmeans.json` in
`benchmarks/results/h100` what is there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import _harness

DOCS = _harness.ROOT / "docs"
README = _harness.ROOT / "packages" / "flash-kmeans" / "README.md"
WHO = ("ours", "baseline")
Rows = list[dict[str, Any]]


def shape_of(row: dict[str, Any]) -> str:
    """Return `batch x points x dim, clusters` of a stored row."""
    gap = f" (of {row['points'] + row['text']:,})" if row.get("text") else ""
    return f"{row['batch']} x {row['points']:,}{gap} x {row['dim']}, {row['clusters']:,}"


def assign_table(result: dict[str, Any]) -> str:
    """Return the best portable kernel and the warp-specialised one for every shape."""
    shapes: dict[str, Rows] = {}
    for row in result["assign"]:
        shapes.setdefault(shape_of(row), []).append(row)
    lines = []
    for shape, rows in shapes.items():
        special = [row for row in rows if row["variant"] == "warp-specialised"]
        best = min((r for r in rows if r not in special), key=lambda r: r["ms"]["median"])
        lines.append([shape, best["variant"], *_speed([best]), *_speed(special)])
    head = ["points, clusters", "portable tile", "ms", "TFLOP/s"]
    return _stated(result) + _harness.table([*head, "warp-specialised ms", "TFLOP/s"], lines)


def _speed(rows: Rows) -> list[str]:
    return [f"{rows[0]['ms']['median']:.2f}", str(rows[0]["tflops"])] if rows else ["-", "-"]


def _stated(result: dict[str, Any]) -> str:
    note = f" {result['note']}." if "note" in result else ""
    return f"{_harness.conditions(result['environment'])}{note}\n\n"


def update_table(result: dict[str, Any]) -> str:
    """Return the time of every kernel of an update."""
    lines = [[f"`{name}`", f"{time:.1f}"] for name, time in result["update_us"].items()]
    total = sum(result["update_us"].values())
    rate = result["update_bytes"] / total / 1e3
    lines.append(["all", f"{total:.1f} ({rate:,.0f} GB/s of points read)"])
    return _stated(result) + _harness.table(["kernel", "us"], lines)


def rounds_table(result: dict[str, Any], groups: tuple[str, ...]) -> str:
    """Return milliseconds per round beside the baselines, with the ratio to flash-kmeans 0.3.1."""
    lines = []
    for row in result["rows"]:
        if row["case"]["group"] not in groups:
            continue
        times = {name: value["median"] for name, value in row["round_ms"].items()}
        cells = [
            f"{times[n]:.3f}" if n in times else "-" for n in ("ours", "baseline", "plain torch")
        ]
        ratio = f"{times['baseline'] / times['ours']:.2f}" if "baseline" in times else "-"
        lines.append([f"{shape_of(row['case'])}, {row['case']['dtype']}", *cells, ratio])
    head = ["points, clusters", "ours, ms", "flash-kmeans 0.3.1, ms", "plain torch, ms", "ratio"]
    return _stated(result) + _harness.table(head, lines)


def halves_table(result: dict[str, Any]) -> str:
    """Return speed of assignment and of the update beside the baseline's, by events."""
    lines = []
    for row in result["rows"]:
        case, parts = row["case"], row["parts_ms"]
        if not parts:
            continue
        points = case["batch"] * case["points"] * case["dim"]
        work = {"assign": 2e-9 * points * case["clusters"], "update": 2e-6 * points}
        times = [(half, parts[f"{who} {half}"]["median"]) for half in work for who in WHO]
        cells = [f"{ms:.2f} ({work[half] / ms:,.0f})" for half, ms in times]
        lines.append([f"{shape_of(case)}, {case['dtype']}", *cells])
    baseline = "flash-kmeans 0.3.1"
    head = [
        "points, clusters",
        "assign, ms (TFLOP/s)",
        baseline,
        "update, ms (GB/s read)",
        baseline,
    ]
    return _harness.table(head, lines)


def fastkmeans_line(result: dict[str, Any]) -> str:
    """Return a sentence on the baseline that takes points from the host."""
    row = result["fastkmeans"]
    return (
        f"\n`fastkmeans` 0.5.0, which takes its points from the host, needs {row['round_ms']:.0f} "
        f"ms a round for {shape_of(row['case'])}.\n"
    )


def draw(result: dict[str, Any], target: Path) -> None:
    """Draw time per round against the number of points and of clusters, beside the baselines."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), facecolor="white", sharey=True)
    for axis, key in zip(axes, ("points", "clusters"), strict=True):
        rows = [row for row in result["rows"] if row["case"]["group"] == key]
        for name in ("ours", "baseline", "plain torch"):
            found = [r for r in rows if name in r["round_ms"]]
            label = "flash-kmeans 0.3.1" if name == "baseline" else name
            axis.loglog(
                [r["case"][key] for r in found],
                [r["round_ms"][name]["median"] for r in found],
                marker="o",
                label=label,
            )
        axis.set_xlabel(key)
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0].set_ylabel("ms per round")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main(gpu: str) -> None:
    """Fill what is marked in the documentation."""
    page = DOCS / "flash-kmeans.md"
    if (_harness.RESULTS / gpu / "kmeans_tiles.json").exists():
        result = _harness.load(gpu, "kmeans_tiles")
        _harness.replace_between(page, "kmeans-assign", assign_table(result))
        _harness.replace_between(page, "kmeans-update", update_table(result))
    if (_harness.RESULTS / gpu / "kmeans.json").exists():
        result = _harness.load(gpu, "kmeans")
        rounds = rounds_table(result, ("video", "public"))
        if "fastkmeans" in result:
            rounds += fastkmeans_line(result)
        for path in (page, README):
            _harness.replace_between(path, "kmeans-rounds", rounds)
            _harness.replace_between(path, "kmeans-halves", halves_table(result))
        draw(result, DOCS / "assets" / "kmeans-time.png")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "h200")
