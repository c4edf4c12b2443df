"""Plots as inline SVG that take their colours from the page, so one plot serves light and dark.

Matplotlib draws with stand-in colours; afterwards each is replaced by a CSS variable.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from svg_models.stats import Grids

INK, MUTED, GRID, PAPER, KEPT, REST = (f"#0{i}0{i}0{i}" for i in range(1, 7))
SERIES = tuple(f"#0a{i:02x}00" for i in range(6))
RAMP = tuple(f"#0b{i:02x}00" for i in range(16))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    PAPER: "--card",
    KEPT: "--kept",
    REST: "--rest",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES)},
    **{colour: f"--ramp-{i}" for i, colour in enumerate(RAMP)},
}
DASHES = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1.2, 2)))
_MOST_BANDS = 6  # layers beyond this share a band in the stacked plot


@contextmanager
def _figure(width: float, height: float, name: str) -> Iterator[tuple[Any, Any]]:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "ytick.major.size": 0,
        "text.color": INK,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots()


def _svg(figure: Any, name: str, title: str, hover: Mapping[str, Any]) -> str:
    """Return a figure as SVG, with what a pointer over it is told.

    Args:
        figure: drawn.
        name: unique on the page.
        title: read to those who cannot see the plot.
        hover: values of the plot for the page's script, which finds them by the axes' box.
    """
    buffer = io.StringIO()
    figure.draw_without_rendering()  # lays it out, so that the box of the axes is known
    width, height = 72 * figure.get_figwidth(), 72 * figure.get_figheight()
    axes = figure.axes[0]
    box = axes.get_position()
    data = dict(hover) | {
        "box": [
            round(edge, 2)
            for edge in (
                box.x0 * width,
                box.x1 * width,
                (1 - box.y1) * height,
                (1 - box.y0) * height,
            )
        ],
        "x": [round(float(edge), 4) for edge in axes.get_xlim()],
        "y": [round(float(edge), 4) for edge in axes.get_ylim()],
    }
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # ids must be unique on the page, which holds several plots
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href=")#', rf"\1#{name}-", text)
    text = text.replace("url(#", f"url(#{name}-")
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=3).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: [\d.]+px [^;\"]*", _font, text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    attributes = f'role="img" aria-label="{escape(title)}" data-plot="{escape(json.dumps(data))}"'
    return text.replace("<svg", f"<svg {attributes}", 1)


def _font(match: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", match.group())
    return f"font-size: {size.group() if size else '11px'}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One clip's line.

    Attributes:
        label: of the clip.
        series: index of its colour.
        dash: index of its kind of line, for clips beyond the number of colours.
        values: one per frame; infinite ones leave a gap.
    """

    label: str
    series: int
    dash: int
    values: Sequence[float]


def lines_per_frame(lines: Sequence[Line], *, unit: str, name: str, title: str) -> str:
    """Draw one line per clip over the video's frames.

    Args:
        lines: of the clips.
        unit: what the values are, for the axis.
        name: unique on the page.
        title: read to those who cannot see the plot.

    Returns:
        An `<svg>` element.
    """
    with _figure(5.4, 2.6, name) as (figure, axes):
        for line in lines:
            finite = np.where(np.isfinite(line.values), line.values, np.nan)
            axes.plot(
                np.arange(1, len(finite) + 1),
                finite,
                color=SERIES[line.series],
                linewidth=2.0,
                linestyle=DASHES[line.dash % len(DASHES)],
            )
        axes.set_xlabel("frame")
        axes.set_title(unit, loc="left", fontsize=10, color=MUTED)
        axes.margins(x=0.01, y=0.08)
        values = [[_plain(value) for value in line.values] for line in lines]
        labels = [line.label for line in lines]
        hover = {"kind": "lines", "unit": unit, "labels": labels, "values": values}
        return _svg(figure, name, title, hover)


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A point of a search.

    Attributes:
        cost: share of dense.
        psnr: dB against dense.
        on_all: whether all prompts met it.
        label: what the page says where a pointer is over it.
    """

    cost: float
    psnr: float
    on_all: bool
    label: str


def quality_against_cost(
    tried: Sequence[Tried],
    frontier: Sequence[tuple[float, float]],
    *,
    chosen: tuple[float, float] | None,
    least: float | None,
    most: float | None,
    floor: float | None,
    axis: str,
    name: str,
    title: str,
) -> str:
    """Draw what points came to: cost (x, share of dense) and PSNR (y), the best ones joined.

    Args:
        tried: every point.
        frontier: the best ones by rising cost, each `(cost, dB)`.
        chosen: the one that was taken; None if none was.
        least: PSNR that was to be reached, or None.
        most: cost that was to be kept, or None.
        floor: PSNR of the noise floor, or None.
        axis: what cost is.
        name: unique on the page.
        title: read to those who cannot see the plot.

    Returns:
        An `<svg>` element.
    """
    from matplotlib.ticker import PercentFormatter

    with _figure(6.4, 3.5, name) as (figure, axes):
        for point in tried:
            face, edge = (SERIES[1], SERIES[1]) if point.on_all else (PAPER, SERIES[0])
            axes.scatter(point.cost, point.psnr, s=26, color=face, edgecolors=edge)
        if frontier:
            x, y = zip(*frontier, strict=True)
            axes.plot(x, y, color=SERIES[1], linewidth=2.0, zorder=1)
        if chosen is not None:
            axes.scatter(*chosen, s=190, marker="*", color=SERIES[3], zorder=3)
        if least is not None:
            axes.axhline(least, color=SERIES[3], linewidth=1.2, linestyle=(0, (5, 4)))
        if most is not None:
            axes.axvline(most, color=SERIES[3], linewidth=1.2, linestyle=(0, (5, 4)))
        lowest, highest = axes.get_ylim()
        if floor is not None and floor < highest + (highest - lowest):
            axes.axhline(floor, color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol="\u00a0%"))
        axes.set_xlabel(axis)
        axes.set_title("dB against dense", loc="left", fontsize=10, color=MUTED)
        axes.margins(x=0.05, y=0.08)
        hover = {
            "kind": "points",
            "labels": [point.label for point in tried],
            "values": [[_plain(point.cost), _plain(point.psnr)] for point in tried],
        }
        return _svg(figure, name, title, hover)


def density_map(grids: Grids, *, top: float, name: str, title: str) -> str:
    """Draw density over steps (x) and layers (y); calls kept dense have a colour of their own.

    Args:
        grids: of one clip.
        top: density at the end of the colour ramp.
        name: unique on the page.
        title: read to those who cannot see the plot.

    Returns:
        An `<svg>` element.
    """
    layers = grids.density.shape[1]
    level = np.where(grids.dense, len(RAMP), _level(grids.density, top))
    with _figure(5.4, 0.95 + min(2.6, 0.17 * layers), name) as (figure, axes):
        _heat(axes, np.ma.array(level, mask=np.isnan(grids.density)).T, [*RAMP, KEPT])
        axes.set_xlabel("denoising step")
        axes.set_ylabel("layer")
        values = [
            [_plain(value) for value in row] for row in np.where(grids.dense, 1.0, grids.density)
        ]
        return _svg(figure, name, title, {"kind": "grid", "across": "step", "values": values})


def head_map(heads: np.ndarray, *, top: float, name: str, title: str) -> str:
    """Draw density over heads (x) and layers (y).

    Args:
        heads: `[layers, heads]`, mean over the sparse calls of a clip; NaN where none was sparse.
        top: density at the end of the colour ramp.
        name: unique on the page.
        title: read to those who cannot see the plot.

    Returns:
        An `<svg>` element.
    """
    with _figure(5.4, 0.95 + min(2.6, 0.17 * len(heads)), name) as (figure, axes):
        _heat(axes, np.ma.array(_level(heads, top), mask=np.isnan(heads)), [*RAMP])
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        values = [[_plain(value) for value in row] for row in heads.T]
        return _svg(figure, name, title, {"kind": "grid", "across": "head", "values": values})


def _level(density: np.ndarray, top: float) -> np.ndarray:
    """Return the place of each density on the colour ramp."""
    place: np.ndarray = np.clip(np.nan_to_num(density) / top * len(RAMP), 0, len(RAMP) - 1)
    return place.astype(int)


def _heat(axes: Any, level: Any, colours: Sequence[str]) -> None:
    """Draw a table of colours, its first row on top, with whole numbers from 1 along both sides."""
    from matplotlib.colors import ListedColormap

    rows, columns = level.shape
    axes.pcolormesh(
        np.arange(columns + 1) + 0.5,
        np.arange(rows + 1) + 0.5,
        level,
        cmap=ListedColormap(list(colours)),
        vmin=-0.5,
        vmax=len(colours) - 0.5,
        edgecolors=PAPER,
        linewidth=1.2 if rows * columns < 800 else 0.2,
    )
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.invert_yaxis()
    _whole_ticks(axes.xaxis, columns)
    _whole_ticks(axes.yaxis, rows)
    axes.tick_params(length=0)


def _plain(value: float) -> float | None:
    """Return a number as JSON has it: rounded, and nothing where it is not finite."""
    return round(float(value), 4) if np.isfinite(value) else None


def _whole_ticks(axis: Any, count: int) -> None:
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, count) if count / n <= 10)
    axis.set_ticks(
        [1, *range(every, count + 1, every)] if every > 2 else range(1, count + 1, every)
    )


def time_stack(
    grids: Grids,
    step_seconds: Sequence[float] | None,
    *,
    top: float,
    series: int,
    name: str,
    title: str,
) -> str:
    """Draw the seconds of each step: attention by layer from below, then the rest of the step.

    Args:
        grids: of one clip, timed.
        step_seconds: wall time of each step, or None to draw attention alone.
        top: upper end of the axis, shared by the plots that are compared.
        series: index of the clip's colour.
        name: unique on the page.
        title: read to those who cannot see the plot.

    Returns:
        An `<svg>` element.

    Raises:
        ValueError: if the run was not timed.
    """
    if grids.seconds is None:
        raise ValueError("this run was not profiled, so there are no times to draw")
    bands = layer_bands(grids.seconds.shape[1])
    x = np.arange(1, len(grids.seconds) + 1)
    base = np.zeros(len(x))
    whole = None
    with _figure(5.4, 2.2, name) as (figure, axes):
        for index, band in enumerate(bands):
            height = grids.seconds[:, band].sum(axis=1)
            strength = 1.0 - 0.62 * index / max(1, len(bands) - 1)
            axes.bar(
                x,
                height,
                bottom=base,
                width=0.78,
                color=SERIES[series],
                alpha=strength,
                edgecolor=PAPER,
                linewidth=0.4,
            )
            base += height
        if step_seconds is not None and len(step_seconds) == len(x):
            rest = np.maximum(np.asarray(step_seconds) - base, 0.0)
            whole = base + rest
            axes.bar(x, rest, bottom=base, width=0.78, color=REST, edgecolor=PAPER, linewidth=0.4)
        axes.set_ylim(0, top * 1.04)
        axes.set_xlim(0.4, len(x) + 0.6)
        _whole_ticks(axes.xaxis, len(x))
        axes.tick_params(length=0)
        axes.set_xlabel("denoising step")
        axes.set_title("seconds", loc="left", fontsize=10, color=MUTED)
        hover = {
            "kind": "bars",
            "values": [_plain(value) for value in grids.seconds.sum(axis=1)],
            "whole": None if whole is None else [_plain(value) for value in whole],
        }
        return _svg(figure, name, title, hover)


def layer_bands(layers: int) -> list[slice]:
    """Group layers, in order, into at most six bands of nearly equal size."""
    edges = np.linspace(0, layers, min(layers, _MOST_BANDS) + 1).round().astype(int)
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]
