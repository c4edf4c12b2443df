"""The page about one run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from svg_models.files import atomic_path
from svg_models.report.plots import density_map, time_stack
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
    recipe = stats.recipe
    sparse = len(stats.sparse_records)
    tiles = [
        (
            "Density of sparse calls",
            *_split(percent(stats.mean_density)),
            "query–key pairs computed",
        ),
        (
            "Density of all calls",
            *_split(percent(stats.mean_density_with_dense_calls)),
            "what the time depends on",
        ),
        ("Sparse calls", f"{sparse:,}", "", f"of {len(stats.records):,} attention calls"),
    ]
    if stats.seconds is not None:
        note = "choosing what to compute included"
        tiles.append(("Time in attention", *_split(seconds(stats.seconds)), note))
    top = top_density([table] if table else [])
    return render(
        "run.html.j2",
        heading=f"{recipe.get('method', 'No attention call')} on {_tokens(stats)}",
        meta=_meta(stats, table),
        tiles=tiles,
        messages=stats.messages,
        density_top=percent(top),
        map=table and Markup(density_map(table, top=top, name="map", title="density")),
        time=_time(table),
        settings=_settings(recipe),
        steps=[(f"step {s + 1}", percent(d)) for s, d in stats.density_by_step.items()],
    )


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
    return [f"{steps} steps", f"{layers} layers", f"branches: {', '.join(branches)}"]


def _time(table: Grids | None) -> Markup | None:
    if table is None or table.seconds is None:
        return None
    top = float(table.seconds.sum(axis=1).max())
    return Markup(time_stack(table, None, top=top, series=1, name="time", title="time by step"))


def _settings(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [("method", recipe.get("method", "–"))]
    for part in ("settings", "schedule"):
        pairs += [(k.replace("_", " "), f"{v}") for k, v in recipe.get(part, {}).items()]
    pairs += [(k, recipe[k]) for k in ("source", "note") if recipe.get(k)]
    return pairs
