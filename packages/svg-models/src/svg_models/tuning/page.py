"""The page of `svg tune`."""

from __future__ import annotations

import json
import math
import os
import shlex
from pathlib import Path
from typing import Any

from markupsafe import Markup

from svg_models.files import atomic_path
from svg_models.report.plots import Tried, quality_against_cost
from svg_models.report.render import NBSP, decibels, percent, render, seconds
from svg_models.tuning.fit import FITTED
from svg_models.tuning.journal import Trial
from svg_models.tuning.result import Means, Tuned
from svg_models.tuning.space import SCHEDULES, Point

__all__ = ["tune_page", "write_tune_page"]


def write_tune_page(tuned: Tuned, path: str | os.PathLike[str]) -> Path:
    """Write the curve of quality against time, and every number behind it, as an HTML page.

    Args:
        tuned: what a search found.
        path: the file to write; missing folders are created.

    Returns:
        The path written.

    Raises:
        SettingError: if no file can be there.
        OutputError: if it cannot be written.
    """
    page = tune_page(tuned)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path).expanduser()


def tune_page(tuned: Tuned) -> str:
    """Return what a search found as one HTML page that loads nothing from elsewhere."""
    means, frontier = tuned.means(), tuned.frontier()
    places = {point: (cost, psnr) for point, (_, psnr, cost) in means.items()}
    tried = [
        Tried(
            cost=cost,
            psnr=psnr,
            on_all=count == len(tuned.prompts),
            label=_label(point, count, psnr, cost),
        )
        for point, (count, psnr, cost) in means.items()
    ]
    by_time = tuned.time_by == "seconds"
    plot = quality_against_cost(
        tried,
        [places[point] for point in frontier],
        chosen=None if tuned.point is None else places[tuned.point],
        least=tuned.target.psnr,
        most=tuned.target.cost,
        floor=tuned.noise_floor,
        axis="denoising time, share of dense" if by_time else "attention computed, share of dense",
        name="curve",
        title="PSNR against cost of every trial, with a line through the best",
    )
    settings = tuned.settings
    return render(
        "tune.html.j2",
        heading=_heading(tuned),
        meta=[
            "embedded model" if tuned.model == "embedded" else tuned.model,
            f"{settings.frames} frames of {settings.width} × {settings.height}",
            f"{tuned.tokens:,} tokens",
            f"{settings.steps_to_run} steps",
            f"{len(tuned.prompts)} prompt{'s' if len(tuned.prompts) > 1 else ''}",
            f"{tuned.machine['device']}, {tuned.machine['dtype']}",
        ],
        tiles=_tiles(tuned),
        verdict=_verdict(tuned),
        plot=Markup(plot),
        by_time=by_time,
        target=_target(tuned),
        floor="" if tuned.noise_floor is None else decibels(tuned.noise_floor),
        rows=[_row(tuned, point, means) for point in _ordered(tuned, frontier)],
        prompts=list(enumerate(tuned.prompts, start=1)),
        settings=_settings(tuned),
        recipe="" if tuned.recipe is None else _json(tuned),
        trials=[_trial(trial) for trial in tuned.trials],
        schedules=list((SCHEDULES if tuned.fit is None else SCHEDULES | FITTED).items()),
        command=_command(tuned),
    )


def _heading(tuned: Tuned) -> str:
    if tuned.recipe is None:
        return "No recipe meets this budget"
    (one,) = tuned.recipe.measured
    quality = decibels(math.inf if one.psnr is None else one.psnr)
    if one.speedup is not None:
        return f"{one.speedup:.2f}× as fast as dense at {quality}"
    return f"{percent(one.work or 0.0)} of the attention for {quality}"


def _name(point: Point | None) -> str:
    """Return a point in words whose numbers stay with their unit."""
    return str(point).replace(" %", f"{NBSP}%")


def _label(point: Point, count: int, psnr: float, cost: float) -> str:
    prompts = f"{count} prompt{'s' if count > 1 else ''}"
    return f"{_name(point)}\n{decibels(psnr)}, {percent(cost)} of dense ({prompts})"


def _target(tuned: Tuned) -> str:
    if tuned.target.psnr is not None:
        return f"at least {decibels(tuned.target.psnr)} in the least time"
    return f"at least {1 / (tuned.target.cost or 1.0):.2f}× as fast as dense, as close as can be"


def _tiles(tuned: Tuned) -> list[tuple[str, str, str, str]]:
    if tuned.recipe is None:
        return []
    (one,) = tuned.recipe.measured
    worst = min((t.psnr for t in tuned.trials if t.point == tuned.point and t.psnr), default=None)
    tiles = [
        (
            "PSNR against dense",
            *_split(decibels(math.inf if one.psnr is None else one.psnr)),
            _mean_of(tuned) + ("" if worst is None else f", worst {decibels(worst)}"),
        ),
        (
            "Attention computed",
            *_split(percent(one.work or 0.0)),
            "query–key pairs of all calls, probes included",
        ),
        ("Perceived difference", f"{one.flip or 0.0:.3f}", "", "FLIP, from 0 (none) to 1"),
    ]
    if one.speedup is not None:
        note = f"{seconds(one.dense_seconds)} dense, {seconds(one.seconds)} with the recipe"
        tiles.insert(1, ("Denoising speed-up", f"{one.speedup:.2f}", "×", note))
    else:
        note = "difference of frame-to-frame changes, of 255 levels"
        tiles.append(("Flicker", f"{one.flicker or 0.0:.2f}", "", note))
    return tiles


def _measured_on(tuned: Tuned) -> int:
    """Return on how many prompts the settings of the recipe were measured."""
    return len({t.prompt for t in tuned.trials if t.point == tuned.point})


def _mean_of(tuned: Tuned) -> str:
    count, asked = _measured_on(tuned), len(tuned.prompts)
    if count == asked:
        return "mean of all prompts" if asked > 1 else "one prompt"
    return f"mean of {count} of {asked} prompts"


def _split(text: str) -> tuple[str, str]:
    number, _, unit = text.partition(NBSP)
    return number, unit


def _verdict(tuned: Tuned) -> str:
    if tuned.recipe is None:
        sentence = tuned.shortfall()
        return f"{sentence[:1].upper()}{sentence[1:]}."
    text = f"Budget: {_target(tuned)}. Selected: {_name(tuned.point)}."
    count, asked = _measured_on(tuned), len(tuned.prompts)
    if count < asked:
        text += f" Time ran out: it was measured on {count} of {asked} prompts only."
    doubts = {t.doubt for t in tuned.trials if t.doubt}
    timed = [t for t in tuned.trials if t.seconds is not None]
    if tuned.time_by == "density":
        text += (
            " Nothing was timed: cost is the amount of attention computed. A whole clip gains "
            "less, by the time spent elsewhere."
        )
    elif doubts:
        text += (
            f" Of {len(tuned.trials)} trials {len(tuned.trials) - len(timed)} could not be timed "
            f"({'; '.join(sorted(doubts)[:2])}); their cost is that of the attention they compute."
        )
    return text


def _ordered(tuned: Tuned, frontier: list[Point]) -> list[Point]:
    """Return the points of the table: the frontier, and what was taken if it is none of it."""
    points = list(frontier)
    if tuned.point is not None and tuned.point not in points:
        points.append(tuned.point)
    return points


def _row(tuned: Tuned, point: Point, means: Means) -> dict[str, Any]:
    trials = [t for t in tuned.trials if t.point == point]
    count, psnr, cost = means[point]
    timed = all(t.seconds is not None for t in trials)
    mean = [sum(getattr(t, name) for t in trials) / count for name in ("ssim", "flip", "flicker")]
    return {
        "name": _name(point),
        "taken": point == tuned.point,
        "cells": [
            decibels(psnr),
            f"{mean[0]:.3f}",
            f"{mean[1]:.3f}",
            f"{mean[2]:.2f}",
            percent(sum(t.work for t in trials) / count),
            f"{1 / cost:.2f}×" if timed else "–",
            f"{count}",
        ],
    }


def _trial(trial: Trial) -> tuple[str, str]:
    quality = "identical" if trial.psnr is None else f"{trial.psnr:.2f} dB"
    return f"{_name(trial.point)}, prompt {trial.prompt + 1}", f"{quality}, cost {trial.cost:.3f}"


def _settings(tuned: Tuned) -> list[tuple[str, str]]:
    settings = tuned.settings
    pairs = [
        ("model", tuned.model),
        ("negative prompt", settings.negative_prompt or "none"),
        ("guidance", f"{settings.guidance:g}"),
        ("seed", f"{settings.seed} for the first prompt, one more for each after it"),
    ]
    pairs += [("LoRA", lora) for lora in tuned.loras]
    pairs += [(name, f"{value}") for name, value in tuned.machine.items() if value is not None]
    return pairs


def _json(tuned: Tuned) -> str:
    document = {} if tuned.recipe is None else tuned.recipe.to_dict()
    return json.dumps(document, indent=2, ensure_ascii=False)


def _command(tuned: Tuned) -> str:
    settings = tuned.settings
    words = ["svg", "tune"]
    if tuned.target.psnr is not None:
        words += ["--psnr", f"{tuned.target.psnr:g}"]
    else:
        words += ["--speedup", f"{1 / (tuned.target.cost or 1.0):.3g}"]
    words += ["--time-by", tuned.time_by]
    if any(trial.point is not None and trial.point.only for trial in tuned.trials):
        words.append("--fit")
    if tuned.model != "embedded":
        words += ["--model", tuned.model]
    words += [word for prompt in tuned.prompts for word in ("--prompt", prompt)]
    words += ["--seed", str(settings.seed), "--steps", str(settings.steps)]
    words += ["--guidance", f"{settings.guidance:g}", "--frames", str(settings.frames)]
    words += ["--size", f"{settings.width}x{settings.height}"]
    optional = {"--negative-prompt": settings.negative_prompt, "--image": settings.image}
    words += [str(word) for name, value in optional.items() if value for word in (name, value)]
    words += [word for lora in tuned.loras for word in ("--lora", lora)]
    return shlex.join(words)
