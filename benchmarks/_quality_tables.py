"""Turn stored measurements of quality into tables and plots of the documentation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _harness import PLUS_MINUS, ROOT, replace_between, stored, table
from _quality_cases import BASELINE, BEST, PRESET
from _quality_times import milliseconds

DOCS = ROOT / "docs"
# Judge -> page, its marker, and plot, where calls were timed for the judge.
PAGES = {
    "embedded": (DOCS / "embedded-model.md", "quality", DOCS / "assets" / "quality.png"),
    "footage": (DOCS / "footage-model.md", "quality", DOCS / "assets" / "quality-footage.png"),
    "embedded4": (DOCS / "embedded-model.md", "quality-four-steps", None),
}
# What the picture shows: as many methods as there are colours that can be told apart.
DRAWN = (
    *("SVG2", "SVG1", "compensation", BASELINE, "error, bias", "error, bias, residual"),
    *("error, bias, response, repair", BEST, PRESET),
)
HEAD: tuple[str, ...] = (
    *("density", "method", "PSNR, dB", "over routing by error, dB", "SSIM", "flicker"),
    *("all calls", "ms a step's call"),
)


def write(path: Path) -> None:
    """Write the tables and the plot of stored results into the page of their judge.

    Args:
        path: what `quality.py run` stored.
    """
    results = stored(path)
    page, marker, plot = PAGES[results.get("judge", "embedded")]
    picture = ""
    if plot is not None:
        draw(results, plot)
        picture = f"![PSNR against time, for every method](assets/{plot.name})\n\n"
    replace_between(page, marker, picture + tables(results))


def tables(results: dict[str, Any]) -> str:
    """Return Markdown: the conditions, then a table for each size, number of steps and schedule."""
    env = results["environment"]
    rows = [*results["cases"].values(), *results["times"].values()]
    commits, devices = (
        dict.fromkeys([env[name], *(row.get(name, env[name]) for row in rows)])
        for name in ("commit", "device")
    )
    clocks = {row.get("device", env["device"]) for row in results["times"].values()}
    timed = ""
    if clocks:
        timed = (
            " The last column is what the attention of a step and layer would take at Wan 720p, "
            f"dense steps included, on {' and '.join(sorted(clocks))}."
        )
    parts = [
        f"{len(results['prompts'])} prompts that no setting was chosen on, guidance "
        f"{results['guidance']}, {env['dtype']} on {' and '.join(devices)}, torch {env['torch']}, "
        f"commit {', '.join(commits)}. Mean ± standard deviation over prompts; differences to "
        "routing by error are of the same prompts at the same density, with their standard error. "
        f"All calls counts dense steps and what probes read.{timed}\n"
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in results["cases"].values():
        groups.setdefault(row["group"], []).append(row)
    for group, rows in groups.items():
        clip = f"{rows[0]['size']} clip, {rows[0]['steps']} steps"
        floor = results["noise_floor"][clip]
        parts.append(
            f"### {group[0].upper()}{group[1:]}\n\nNoise floor (another dense kernel): PSNR "
            f"{_spread(floor['psnr'], 1)}, SSIM {_spread(floor['ssim'], 3)}.\n"
        )
        lines = [_line(row, rows, results["times"]) for row in sorted(rows, key=_density)]
        columns = len(HEAD) if clocks else len(HEAD) - 1
        parts.append(table(HEAD[:columns], [line[:columns] for line in lines]))
    return "\n".join(parts)


def _density(row: dict[str, Any]) -> float:
    return float(row["density"])


def _line(
    row: dict[str, Any], rows: Sequence[dict[str, Any]], times: dict[str, Any]
) -> Sequence[str]:
    time = step_milliseconds(row, times)
    flicker = row["flicker"]["mean"]
    return (
        f"{row['density']:.0%}",
        row["method"],
        _spread(row["psnr"], 1),
        gain(row, rows),
        f"{row['ssim']['mean']:.3f}",
        f"{flicker:.2f}",
        f"{row['total_density']:.1%}",
        "" if time is None else f"{time:.1f}",
    )


def gain(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return the mean difference to routing by error over prompts, with its standard error."""
    base = [r for r in rows if r["method"] == BASELINE and r["density"] == row["density"]]
    if not base or row["method"] == BASELINE:
        return ""
    pairs = zip(row["per_clip"]["psnr"], base[0]["per_clip"]["psnr"], strict=True)
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if len(differences) < 2:
        return f"{differences[0]:+.1f}" if differences else ""
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.mean(differences):+.1f}{PLUS_MINUS}{error:.1f}"


def step_milliseconds(row: dict[str, Any], times: dict[str, Any]) -> float | None:
    """Return what a call at Wan 720p takes, averaged over steps; None where it was not timed."""
    sparse = milliseconds(list(times.values()), row["method"], row["realised_density"])
    if sparse is None or "dense" not in times:
        return None
    share = float(row["dense_share"])
    return share * float(times["dense"]["median"]) + (1.0 - share) * sparse


def _spread(numbers: dict[str, float | None], digits: int) -> str:
    if numbers["mean"] is None:
        return "identical"
    return f"{numbers['mean']:.{digits}f}{PLUS_MINUS}{numbers['std']:.{digits}f}"


def draw(results: dict[str, Any], target: Path) -> None:
    """Draw PSNR against time at Wan 720p; where nothing was timed, against the pairs of all calls.

    `DRAWN` says which methods. A panel for each size of clip and number of steps; colours are
    methods, markers schedules.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    rows = [
        row
        for row in results["cases"].values()
        if row["psnr"]["mean"] is not None and row["method"] in DRAWN
    ]
    panels = list(dict.fromkeys((row["size"], row["steps"]) for row in rows))
    colours = {name: f"C{i}" for i, name in enumerate(DRAWN)}
    markers = dict(zip(_distinct(rows, "schedule"), "os^Dv*", strict=False))
    timed = "dense" in results["times"]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.4 * columns, 3.6 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for (size, steps), axis in zip(panels, axes.flat, strict=False):
        curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for row in rows:
            x = step_milliseconds(row, results["times"]) if timed else 100 * row["total_density"]
            if (row["size"], row["steps"]) == (size, steps) and x is not None:
                curve = curves.setdefault((row["method"], row["schedule"]), [])
                curve.append((x, row["psnr"]["mean"]))
        for (method, schedule), points in curves.items():
            x, y = zip(*sorted(points), strict=True)
            axis.plot(x, y, color=colours[method], marker=markers[schedule], alpha=0.8)
        floor = results["noise_floor"][f"{size} clip, {steps} steps"]["psnr"]["mean"]
        known = "" if floor is None else f" (noise floor {floor:.0f} dB)"
        axis.set_title(f"{size} clip, {steps} steps{known}", fontsize=10)
        axis.set_xlabel("ms a call at Wan 720p, mean of steps" if timed else "pairs, %")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("PSNR against dense, dB")
    shown = {row["method"] for row in rows}
    handles = [Line2D([], [], color=c, label=name) for name, c in colours.items() if name in shown]
    handles += [
        Line2D([], [], color="grey", ls="", marker=m, label=name) for name, m in markers.items()
    ]
    room = 0.07 * -(-len(handles) // 3) / lines
    figure.tight_layout(rect=(0, room, 1, 1))
    figure.legend(handles=handles, fontsize=8, ncols=3, loc="lower center")
    figure.savefig(target, dpi=130)
    plt.close(figure)


def _distinct(rows: Sequence[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))
