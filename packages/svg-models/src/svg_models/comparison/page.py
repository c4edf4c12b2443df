"""The page of `svg compare`."""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from markupsafe import Markup

from svg_models.comparison.table import COLUMNS, cells, dense_cells
from svg_models.comparison.timing import NOISE
from svg_models.errors import shortened
from svg_models.method_names import SCHEDULE_SETTINGS
from svg_models.report.plots import Line, density_map, head_map, lines_per_frame, time_stack
from svg_models.report.render import NBSP, decibels, percent, render, seconds
from svg_models.report.run import heads_differ, top_density
from svg_models.video import encode, enlarge

if TYPE_CHECKING:
    from svg_models.comparison.candidate import Candidate
    from svg_models.comparison.timing import Speed
    from svg_models.generation.clip import Clip
    from svg_models.stats import Grids
    from svg_models.video import Similarity

COLOURS = 5  # of methods; beyond them the kind of line tells them apart
_SHOWN_WIDTH = 384  # small clips are enlarged so that 4:2:0 video does not smear their edges


class Compared(Protocol):
    """What the page shows."""

    @property
    def dense(self) -> Clip:
        """Return the clip that the others are measured against."""
        ...

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Return the sparse clips."""
        ...

    @property
    def machine(self) -> dict[str, Any]:
        """Return what they ran on."""
        ...

    @property
    def no_speed(self) -> str:
        """Return why no speed can be claimed, or nothing."""
        ...

    @property
    def gains_from(self) -> str:
        """Return at which size this machine would gain, where this clip is too short to."""
        ...

    @property
    def clips(self) -> list[Clip]:
        """Return the dense clip, then the others."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures as plain values for JSON."""
        ...


def comparison_page(comparison: Compared) -> str:
    """Return the whole comparison as one HTML page that loads nothing from elsewhere.

    Args:
        comparison: what `compare` returned.
    """
    settings = comparison.dense.settings
    rows = _rows(comparison)
    best = max(comparison.candidates, key=lambda c: c.similarity.mean_psnr, default=None)
    tables = [clip.stats.grids for clip in comparison.clips]
    found = [table for table in tables if table is not None]
    top = top_density(found)
    return render(
        "comparison.html.j2",
        prompt=settings.prompt,
        meta=_meta(comparison),
        best=rows[1 + comparison.candidates.index(best)] if best else rows[0],
        tiles=_tiles(best) if best else [],
        verdict=_verdict(comparison, best) if best else "",
        fps=f"{settings.fps:g}",
        frames=len(comparison.dense.frames),
        rows=rows,
        table_note=_table_note(comparison),
        columns=COLUMNS,
        curves=_curves(comparison, rows),
        heads=_heads(comparison, rows),
        prompt_short=shortened(settings.prompt, 80),
        data=_data(comparison),
        density_top=percent(top),
        maps=_maps(comparison, rows, tables, top),
        times=[] if comparison.no_speed else _times(comparison, rows, tables),
        settings=_settings(comparison),
        configs=[(c.method.title, _config(c)) for c in comparison.clips],
        command=_command(comparison),
    )


def _rows(comparison: Compared) -> list[dict[str, Any]]:
    dense, candidates = comparison.dense, comparison.candidates
    rows = [_row(dense, 0, None) | {"cells": dense_cells(dense, candidates)}]
    for index, candidate in enumerate(candidates):
        row = _row(candidate.clip, index + 1, candidate)
        rows.append(row | {"cells": cells(candidate, dense, candidates)})
    return rows


def _row(clip: Clip, place: int, candidate: Candidate | None) -> dict[str, Any]:
    close = candidate.similarity if candidate else None
    factor = max(1, math.ceil(_SHOWN_WIDTH / clip.frames.shape[2]))
    shown = enlarge(clip.frames, factor)
    psnr = close.to_dict()["psnr_db"] if close else None
    known = [(value, frame) for frame, value in enumerate(psnr or ()) if value is not None]
    return {
        "label": clip.method.title,
        "file": f"{clip.method.slug}.mp4",
        "series": 0 if not place else 1 + (place - 1) % COLOURS,
        "dash": 0 if not place else (place - 1) // COLOURS,
        "density": percent(clip.stats.mean_density) if clip.stats.sparse_calls else percent(1.0),
        "psnr": decibels(close.mean_psnr) if close else "",
        "psnr_json": json.dumps(psnr),
        "worst": min(known)[1] if known else None,
        "worst_psnr": decibels(min(known)[0]) if known else "",
        "source": _data_address(shown, clip.settings.fps),
        "height": shown.shape[1],
        "width": shown.shape[2],
    }


def _data_address(frames: Any, fps: float) -> str:
    file = io.BytesIO()
    encode(frames, file, fps=fps, crf=18)
    return "data:video/mp4;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _meta(comparison: Compared) -> list[str]:
    settings, machine = comparison.dense.settings, comparison.machine
    name = "embedded model" if comparison.dense.model == "embedded" else comparison.dense.model
    count = machine.get("threads")
    run = settings.steps_to_run
    threads = f", {count} thread{'s' if count > 1 else ''}" if count else ""
    return [
        name,
        f"{settings.frames} frames of {settings.width} × {settings.height}",
        f"{comparison.dense.stats.tokens:,} tokens",
        f"{settings.steps} steps" if run == settings.steps else f"{run} of {settings.steps} steps",
        f"seed {settings.seed}",
        f"{machine['device']}{threads}, {machine['dtype']}",
    ]


def _tiles(best: Candidate) -> list[tuple[str, str, str, str]]:
    clip, close = best.clip, best.similarity
    psnr = decibels(close.mean_psnr).split(NBSP)
    everything = percent(clip.stats.mean_density_with_dense_calls)
    return [
        (
            "PSNR against dense",
            psnr[0],
            "dB" if len(psnr) > 1 else "",
            f"worst frame {decibels(close.worst_psnr)}",
        ),
        ("SSIM against dense", f"{close.mean_ssim:.3f}", "", f"worst frame {min(close.ssim):.3f}"),
        (
            "Attention computed",
            percent(clip.stats.mean_density).removesuffix(f"{NBSP}%"),
            "%",
            f"in sparse calls; {everything} over all calls",
        ),
        _speed_tile(best.speed),
    ]


def _speed_tile(speed: Speed | None) -> tuple[str, str, str, str]:
    name = "Denoising speed-up"
    if speed is None:
        return name, "–", "", "not shown, see below"
    note = f"a step {seconds(speed.dense_step)} dense, {seconds(speed.step)} sparse"
    return name, f"{speed.speedup:.2f}", "×", note


def _verdict(comparison: Compared, best: Candidate) -> str:
    if comparison.no_speed:
        return f"No speed is shown, because {comparison.no_speed}."
    speed = best.speed
    if speed is None:
        return "None of its steps was sparse, so there is no speed to show."
    if abs(speed.speedup - 1) <= NOISE:
        text = "It took as long as dense on this machine."
    elif speed.speedup > 1:
        text = f"It finished denoising {speed.speedup:.2f}× as fast as dense on this machine."
    else:
        text = f"It took {1 / speed.speedup:.2f}× as long as dense on this machine."
    timed = [(c.speed.speedup, c.clip) for c in comparison.candidates if c.speed is not None]
    speedup, clip = max(timed, key=lambda pair: pair[0])
    if speedup > (1 + NOISE) * speed.speedup:
        text += f" The fastest was {clip.method.title} with {speedup:.2f}×."
    share = percent(speed.dense_attention / speed.dense_step)
    text += (
        f" Self-attention is {share} of a dense step, "
        f"{seconds(speed.dense_attention)} against {seconds(speed.attention)} here"
    )
    if speed.bound is not None:
        text += f", so with these dense steps no method can be more than {speed.bound:.2f}× as fast"
    return f"{text}. {comparison.gains_from}".strip()


def _table_note(comparison: Compared) -> str:
    budgets = {c.clip.method.density for c in comparison.candidates}
    if len(budgets) == 1 and (budget := next(iter(budgets))) is not None:
        return (
            f"Every method has the same budget, {percent(budget)} of the query–key pairs; the "
            "densities in the table are measured."
        )
    return "Budgets differ; the densities in the table are measured."


def _curves(comparison: Compared, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a plot for each measure of similarity, with a line for every method."""
    measures: tuple[tuple[str, str, Callable[[Similarity], Sequence[float]]], ...] = (
        ("PSNR", "dB", lambda close: close.psnr),
        ("SSIM", "SSIM", lambda close: close.ssim),
        ("FLIP", "FLIP", lambda close: close.flip),
    )
    plots = []
    for name, unit, read in measures:
        lines = [
            Line(
                label=row["label"],
                series=row["series"],
                dash=row["dash"],
                values=read(candidate.similarity),
            )
            for row, candidate in zip(rows[1:], comparison.candidates, strict=True)
        ]
        title = f"{name} of each frame against the dense clip, one line per method"
        picture = lines_per_frame(lines, unit=unit, name=name.lower(), title=title)
        plots.append({"title": f"{name} per frame", "picture": Markup(picture)})
    return plots


def _heads(comparison: Compared, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a map of density by head for each clip whose heads differ."""
    told = (clip.stats.head_density for clip in comparison.clips)
    tables = [None if heads is None or not heads_differ(heads) else heads for heads in told]
    known = [np.nanmax(table) for table in tables if table is not None]
    top = min(1.0, max(known)) if known else 1.0
    items = []
    for index, (row, table) in enumerate(zip(rows, tables, strict=True)):
        if table is not None:
            title = f"Density by layer and head of {row['label']}"
            picture = head_map(table, top=top, name=f"heads{index}", title=title)
            value = f"{percent(float(np.nanmin(table)))} to {percent(float(np.nanmax(table)))}"
            items.append(row | {"value": value, "picture": Markup(picture)})
    return items


def _data(comparison: Compared) -> Markup:
    """Return the numbers as JSON that can stand in a page."""
    return Markup(json.dumps(comparison.to_dict()).replace("<", "\\u003c"))


def _config(clip: Clip) -> str:
    """Return what a clip ran with, without what every recipe file has."""
    recipe = {name: value for name, value in clip.stats.recipe.items() if value not in ("", [], {})}
    return json.dumps(recipe)


def _maps(
    comparison: Compared, rows: list[dict[str, Any]], tables: list[Grids | None], top: float
) -> list[dict[str, Any]]:
    items = []
    for index, (row, table) in enumerate(zip(rows, tables, strict=True)):
        if table is not None and table.has_sparse_calls:
            title = f"Density by layer and step of {row['label']}"
            picture = density_map(table, top=top, name=f"map{index}", title=title)
            items.append(row | {"value": row["density"], "picture": Markup(picture)})
    return items


def _times(
    comparison: Compared, rows: list[dict[str, Any]], tables: list[Grids | None]
) -> list[dict[str, Any]]:
    ready = [
        (row, table, clip)
        for row, table, clip in zip(rows, tables, comparison.clips, strict=True)
        if table is not None and table.seconds is not None
    ]
    top = max((max(clip.step_seconds, default=0.0) for _, _, clip in ready), default=0.0)
    items = []
    for index, (row, table, clip) in enumerate(ready):
        picture = time_stack(
            table,
            clip.step_seconds,
            top=top or 1.0,
            series=row["series"],
            name=f"time{index}",
            title=f"Seconds of each denoising step of {row['label']}",
        )
        value = f"{seconds(clip.stats.seconds)} of {seconds(clip.seconds)} in attention"
        items.append(row | {"value": value, "picture": Markup(picture)})
    return items


def _settings(comparison: Compared) -> list[tuple[str, str]]:
    """Return what stands nowhere else on the page."""
    settings = comparison.dense.settings
    pairs = [
        ("prompt", settings.prompt),
        ("negative prompt", settings.negative_prompt or "none"),
        ("guidance", f"{settings.guidance:g}"),
        ("frames per second", f"{settings.fps:g}"),
    ]
    if settings.flow_shift is not None:
        pairs.append(("flow shift", f"{settings.flow_shift:g}"))
    sources = (settings.image, settings.last_image, settings.video)
    pairs += [("starts from", str(path)) for path in sources if path]
    pairs += [("LoRA", lora) for lora in comparison.dense.loras]
    shown = ("device", "threads", "dtype")  # above, beside the prompt
    machine = comparison.machine.items()
    pairs += [(n, f"{v}") for n, v in machine if v is not None and n not in shown]
    return pairs


def _command(comparison: Compared) -> str:
    dense = comparison.dense
    settings = dense.settings
    words = ["svg", "compare", settings.prompt]
    if dense.model != "embedded":
        words += ["--model", dense.model]
    for candidate in comparison.candidates:
        words += candidate.clip.method.words
    words += ["--seed", str(settings.seed), "--steps", str(settings.steps)]
    words += ["--guidance", f"{settings.guidance:g}", "--frames", str(settings.frames)]
    words += ["--size", f"{settings.width}x{settings.height}"]
    optional = {
        "--negative-prompt": settings.negative_prompt,
        "--image": settings.image,
        "--last-image": settings.last_image,
        "--video": settings.video,
        "--strength": settings.strength,
        "--flow-shift": settings.flow_shift,
        **_adjustments(comparison),
    }
    for name, value in optional.items():
        if value is not None and value != "":
            words += [name, f"{value:g}" if isinstance(value, float) else str(value)]
    words += [word for lora in dense.loras for word in ("--lora", lora)]
    return shlex.join(words)


def _adjustments(comparison: Compared) -> dict[str, Any]:
    """Return the options that hold for all methods which have such a setting."""
    names = ("q_clusters", "k_clusters", *SCHEDULE_SETTINGS)
    found = {}
    for name in names:
        values = (getattr(c.clip.method, name) for c in comparison.candidates)
        found["--" + name.replace("_", "-")] = next((v for v in values if v is not None), None)
    return found
