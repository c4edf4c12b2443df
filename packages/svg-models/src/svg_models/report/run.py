"""The page about one run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from svg_models.errors import shortened
from svg_models.files import atomic_path
from svg_models.method_names import METHODS
from svg_models.report.plots import density_map, head_map, time_stack
from svg_models.report.render import NBSP, percent, render, seconds

if TYPE_CHECKING:
    from svg_models.stats import Grids, RunStats


def write_run_report(stats: RunStats, path: str | os.PathLike[str]) -> Path:
    """Write a self-contained HTML page about a run.

    Args:
        stats: of the run.
        path: the file to write; missing folders are created.

    Returns:
        The path written.

    Raises:
        SettingError: if the path cannot be written.
    """
    page = run_page(stats)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path).expanduser()


def run_page(stats: RunStats) -> str:
    """Return the page about a run as HTML.

    Args:
        stats: of the run; without any call it says so instead of drawing plots.
    """
    table = stats.grids
    facts = stats.facts
    heads = stats.head_density
    top = top_density([table] if table else [])
    return render(
        "run.html.j2",
        heading=facts.get("prompt") or f"{_method(stats)} on {_tokens(stats)}",
        short=shortened(str(facts.get("prompt") or _method(stats)), 80),
        meta=_meta(stats, table),
        tiles=_tiles(stats),
        messages=stats.messages,
        density_top=percent(top),
        plots=_plots(table, top, heads),
        legend=table is not None and table.has_sparse_calls,
        settings=_settings(stats),
        command=facts.get("command", ""),
        data=Markup(json.dumps(stats.to_dict(), default=str).replace("<", "\\u003c")),
    )


def _method(stats: RunStats) -> str:
    """Return the method for people; a run whose calls were all dense is called so."""
    if not stats.records:
        return "No attention call"
    if not stats.sparse_calls:
        return "Dense attention"
    name = str(stats.recipe.get("method", "Sparse attention"))
    return METHODS.get(name.lower(), name)


def _tiles(stats: RunStats) -> list[tuple[str, str, str, str]]:
    calls = f"of {stats.calls:,} attention calls"
    tiles = [("Sparse calls", f"{stats.sparse_calls:,}", "", calls)]
    if stats.sparse_calls:
        tiles = [
            (
                "Density of sparse calls",
                *_split(percent(stats.mean_density)),
                "query–key pairs computed",
            ),
            (
                "Density of all calls",
                *_split(percent(stats.mean_density_with_dense_calls)),
                "determines the time",
            ),
            *tiles,
        ]
    elif stats.calls:
        tiles = [("Sparse calls", "0", "", f"{calls}: attention was dense throughout")]
    if stats.seconds is not None:
        note = "planning included"
        tiles.append(("Time in attention", *_split(seconds(stats.seconds)), note))
    return tiles


def _plots(
    table: Grids | None, top: float, heads: np.ndarray | None
) -> list[tuple[str, str, Markup]]:
    plots = []
    if table is not None and table.has_sparse_calls:
        picture = density_map(table, top=top, name="map", title="Density by layer and step")
        plots.append(("Density by layer and step", "", Markup(picture)))
    if heads is not None and heads_differ(heads):
        most = min(1.0, float(np.nanmax(heads)))
        picture = head_map(heads, top=most, name="heads", title="Density by layer and head")
        value = f"{percent(float(np.nanmin(heads)))} to {percent(most)}"
        plots.append(("Density by layer and head", value, Markup(picture)))
    if (time := _time(table)) is not None:
        plots.append(("Seconds in attention by step", "first layers strong, last faint", time))
    return plots


def heads_differ(heads: np.ndarray) -> bool:
    """Return whether the densities of heads differ by what a reader can see, half a per cent."""
    return float(np.nanmax(heads) - np.nanmin(heads)) >= 0.005


def top_density(tables: list[Grids]) -> float:
    """Return the end of the colour ramp: the highest sparse density, up to the next 10 %."""
    values = [float(t.density[~t.dense].max()) for t in tables if t.has_sparse_calls]
    return min(1.0, max(0.1, np.ceil(max(values) * 10 - 1e-6) / 10)) if values else 1.0


def _split(text: str) -> tuple[str, str]:
    number, _, unit = text.rpartition(NBSP)
    return number, unit


def _tokens(stats: RunStats) -> str:
    return f"{stats.records[0].tokens:,} tokens" if stats.records else "no tokens yet"


def _meta(stats: RunStats, table: Grids | None) -> list[str]:
    if table is None:
        return ["no denoising step was recorded"]
    steps, layers = table.density.shape
    branches = sorted({r.branch for r in stats.records})
    named = [f"{_method(stats)} on {_tokens(stats)}"] if stats.facts.get("prompt") else []
    return [*named, f"{steps} steps", f"{layers} layers", f"branches: {', '.join(branches)}"]


def _time(table: Grids | None) -> Markup | None:
    if table is None or table.seconds is None:
        return None
    top = float(table.seconds.sum(axis=1).max())
    return Markup(time_stack(table, None, top=top, series=1, name="time", title="time by step"))


def _settings(stats: RunStats) -> list[tuple[str, str]]:
    """Return everything that the run depended on, each once."""
    recipe = stats.recipe
    shown = {n: v for n, v in stats.facts.items() if n != "command" and v not in (None, "")}
    pairs = [(name.replace("_", " "), f"{value}") for name, value in shown.items()]
    pairs.append(("method", recipe.get("method", "–")))
    for part in ("settings", "schedule"):
        given = ((k.replace("_", " "), v) for k, v in recipe.get(part, {}).items())
        named = ((f"{part} {k}" if k in dict(pairs) else k, v) for k, v in given)
        pairs += [(k, f"{v}") for k, v in named if v is not None]
    if "fp8" in (recipe.get("linears"), recipe.get("attention")):
        pairs += [(k, recipe[k]) for k in ("linears", "attention")]
        pairs.append(("fp8 from", f"{recipe['fp8_from']} ({stats.fp8_calls:,} attention calls)"))
    pairs += [(k, recipe[k]) for k in ("source", "note") if recipe.get(k)]
    return pairs
