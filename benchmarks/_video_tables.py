"""The tables and the picture of whole videos, from what `bench_video.py` has stored."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _harness import ROOT, conditions_of, load, replace_between, table
from _video_parts import FIRST, SPARSE
from _video_rows import BOTH, ROWS, Row, known, run_whole, seconds_of, step_seconds

PAGES = (ROOT / "docs" / "speed.md", ROOT / "README.md")
PICTURE = ROOT / "docs" / "assets" / "video-seconds.png"
COLOURS = {
    "start": "#8c8c8c",
    "dense steps": "#4477aa",
    "first sparse step": "#ee8866",
    "sparse steps": "#66aa77",
    "decoding": "#bbbbbb",
}
MASKED = (
    " HunyuanVideo 1.5 in diffusers masks the padding of its text in every layer, for which torch "
    "has no fast kernel; sparsify cuts the padding off, in dense steps too."
)


def rows_of(video: Mapping[str, Any]) -> list[list[str]]:
    """Return the lines of one video."""
    lines, sums, passes = [], known(video), video["passes"]
    for row in ROWS:
        whole = run_whole(video, row)
        ran = None if whole is None else sum(whole.values())
        if row.name not in sums and ran is None:
            continue
        if row.name in sums:
            source = video["parts"][row.sparse or (row.dense or ("diffusers", ""))[0]]
            before = video["parts"][row.dense[0]] if row.dense else source
            faster = sums[row.stock] / sums[row.name]
        else:
            source = before = video["whole"][row.name]
            stock = run_whole(video, next(one for one in ROWS if one.name == row.stock))
            faster = None if stock is None else sum(stock.values()) / (ran or 1.0)
        step, dense_step = step_seconds(source, passes), step_seconds(before, passes)
        early = dense_step.get(row.dense[1]) if row.dense else None
        peak = source.get("peak_denoising_gb") or source["peak_gb"]
        lines.append(
            [
                f"{video['name']}, {row.steps or video['published_steps']} steps",
                row.name,
                row.fp8 if source["fp8_calls"] else row.fp8.replace(BOTH, "products"),
                f"{early:.2f}" if early else "",
                f"{step[FIRST]:.2f}" if row.sparse else "",
                f"{step[SPARSE]:.2f}" if row.sparse else "",
                f"{sums[row.name]:,.0f}" if row.name in sums else "",
                f"{ran:,.0f}" if ran else "",
                f"{faster:.2f}" if faster else "",
                f"{peak:.0f}" if peak else "",
            ]
        )
    return lines


def shown(video: Mapping[str, Any], row: Row) -> dict[str, float] | None:
    """Return the seconds of the parts of a row: as run where all steps were, else as counted."""
    return run_whole(video, row) or seconds_of(video, row)


def machines(result: Mapping[str, Any]) -> str:
    """Return the sentences about machine and software; one for each that is in the result."""
    told = [
        part["environment"]
        for video in result["videos"]
        for part in (*video["parts"].values(), *video["whole"].values())
    ]
    return conditions_of(env for env in told if env)


def written(result: Mapping[str, Any]) -> str:
    """Return the table and its conditions."""
    head = [
        *("video", "run", "in fp8", "s a dense step", "first sparse step", "sparse step"),
        *("s in all", "every step really run", "times faster", "peak GB"),
    ]
    lines = [line for video in result["videos"] for line in rows_of(video)]
    shares = "; ".join(
        f"{video['name']} {video['dense_steps']:.0%} of the steps and {video['dense_layers']:.1%} "
        "of the layers"
        for video in result["videos"]
        if rows_of(video)
    )
    return table(head, lines) + (
        f"\nSparse attention at {result['density']:.0%} density. Dense as published: {shares}. "
        "Random weights, prompt embeddings given, decoding included (of HunyuanVideo by our "
        "kernels, in the same tiles, but in rows of diffusers). Seconds in all are those of "
        "the steps, as often as they run; where every step was run as well, both stand there. "
        "Steps are guided where the model is. Peaks are those of denoising, but that runs of "
        f"diffusers measured before the two were told apart have decoding in them.{MASKED}\n"
    )


def short(result: Mapping[str, Any]) -> str:
    """Return the table of the README: seconds of a video, one line a model."""
    names = ("diffusers", "SVG2", "SVG2, fp8 products", "SVG2, fp8", "no dense step, fp8")
    rows = [next(row for row in ROWS if row.name == name) for name in names]
    lines = []
    for video in result["videos"]:
        found = {row.name: shown(video, row) for row in rows}
        sums = {name: sum(parts.values()) for name, parts in found.items() if parts is not None}
        if "SVG2" not in sums or "diffusers" not in sums:
            continue
        base = sums["diffusers"]
        cells = [
            f"{sums[n]:,.0f} s" + ("" if n == "diffusers" else f" ({base / sums[n]:.2f}x)")
            if n in sums
            else ""
            for n in names
        ]
        lines.append([f"{video['name']}, {video['published_steps']} steps", *cells])
    masked = any("HunyuanVideo 1.5" in line[0] for line in lines)
    told = (
        "Seconds of a whole video, decoding included, and times faster than diffusers; SVG2 at "
        f"{result['density']:.0%}, dense steps as published unless there are none.{MASKED * masked}"
    )
    return f"{table(['video', *names], lines)}\n{told}"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the seconds of each video, stock and by us, their parts stacked, each to its scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = ("diffusers", "SVG2", "SVG2, fp8")
    bars: list[tuple[str, dict[str, float], float, bool]] = []
    for video in result["videos"]:
        found = [(row.name, shown(video, row)) for row in ROWS if row.name in names]
        stock = sum((found[0][1] or {}).values())
        ready = [(name, parts) for name, parts in found if parts is not None]
        for place, (name, parts) in enumerate(ready):
            bars.append((name, parts, stock, place == 0))
        if ready:
            bars[-len(ready)] = (f"{video['name']}\n{ready[0][0]}", *bars[-len(ready)][1:])
    heights, place = [], 0.0
    for bar in bars:
        place += 0.7 if bar[3] and heights else 0.0
        heights.append(place)
        place += 1.0
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.36 * place))
    for index, (height, (_, parts, stock, _)) in enumerate(zip(heights, bars, strict=True)):
        left, whole = 0.0, sum(parts.values())
        for part, colour in COLOURS.items():
            label, share = None if index else part, parts[part] / stock
            axes.barh(height, share, left=left, color=colour, label=label, height=0.86)
            left += share
        faster = "" if whole == stock else f", {stock / whole:.2f}x"
        axes.text(left + 0.01, height, f"{whole:,.0f} s{faster}", va="center", fontsize=8)
    axes.set_yticks(heights, [label for label, *_ in bars], fontsize=8)
    axes.set_ylim(place, -1.0)
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("seconds of the whole video, relative to diffusers; one GPU")
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(COLOURS), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_table(args: argparse.Namespace) -> None:
    """Fill the tables and draw the picture.

    Raises:
        SystemExit: if nothing is stored.
    """
    result = load(args.gpu, args.name)
    if not any(rows_of(video) for video in result.get("videos", [])):
        raise SystemExit(f"no video is stored for {args.gpu} as {args.name}; name another")
    picture = f"![Seconds of a video, stock and sparse](assets/{PICTURE.name})"
    text = f"{picture}\n\n{machines(result)}\n\n{written(result)}"
    replace_between(PAGES[0], "videos", text)
    replace_between(PAGES[1], "videos", f"{short(result)}\n\n{machines(result)}")
    draw(result, PICTURE)
