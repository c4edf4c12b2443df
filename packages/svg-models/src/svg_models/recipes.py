"""Which method and schedule a model gets when the user names none.

Published settings exist for a few checkpoints and sizes. Each family lists them as data
(`Published`); the rules here turn the nearest one into a `Recipe` for the clip at hand.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from torch import nn

from svg_attention import SVG1, SVG2, Dense, Method, Schedule, cluster_counts
from svg_models.families import Family, family_of, transformers_of
from svg_models.families.published import SHARED, Published
from svg_models.method_names import MethodSpec
from svg_models.numeric import as_whole
from svg_models.presets import PresetRow, find_row
from svg_models.recipe import Recipe
from svg_models.spelling import checks_names

__all__ = ["choose_recipe", "nearest", "recipe_for"]

FEW_STEPS = 8
SMALLEST_SEQUENCE = 1024
SMALLEST_SHARE = 1.75
SMALL = 0.75
SMALL_DENSITY = 0.3
# Rounds of k-means of a layer's first sparse step. SVG2 was published with 50, which take as long
# as the rest of that step; ten came as close to the dense clip on the embedded model.
FIRST_ITERATIONS = 10
# Rounds of later steps. SVG2 was published with 2; one came as close, within what 8 prompts tell,
# and takes 3 ms less of 54 at Wan 720p (benchmarks/results/h200/quality_rounds.json).
STEP_ITERATIONS = 1
ROUNDS: dict[str, Any] = {"first_iterations": FIRST_ITERATIONS, "step_iterations": STEP_ITERATIONS}
LARGEST_SVG1_DENSITY = 0.5


def choose_recipe(
    spec: MethodSpec,
    pipe: object,
    tokens: int,
    *,
    schedule: Schedule | None = None,
    num_steps: int | None = None,
    latent_frames: int | None = None,
) -> Recipe:
    """Choose what a clip runs with: what was asked for, and the model's recipe for the rest.

    Dense steps and layers that were given beside a name take the place of the recipe's.

    Args:
        spec: the method that was asked for; `auto` is the recipe's.
        pipe: as `recipe_for`; not looked at where method and schedule are both given.
        tokens: as `recipe_for`.
        schedule: the schedule that was asked for; None for the recipe's.
        num_steps: as `recipe_for`; decides only whether `auto` stays dense.
        latent_frames: as `recipe_for`; decides only whether `auto` stays dense.

    Returns:
        A recipe whose source is "user" where a ready method or dense attention was asked for; a
        ready recipe as it is.
    """
    recipe = _choose(spec, pipe, tokens, schedule, num_steps, latent_frames)
    return dataclasses.replace(
        recipe,
        schedule=spec.schedule(recipe.schedule),
        schedules={name: spec.schedule(one) for name, one in recipe.schedules.items()},
    )


def _choose(
    spec: MethodSpec,
    pipe: object,
    tokens: int,
    schedule: Schedule | None,
    num_steps: int | None,
    latent_frames: int | None,
) -> Recipe:
    """Return what `choose_recipe` does, but for dense steps and layers given beside a name."""
    if spec.recipe is not None:
        if schedule is None:
            return spec.recipe
        return dataclasses.replace(spec.recipe, schedule=schedule, schedules={})
    if spec.is_preset:
        recipe = _of_preset(spec.name, pipe, tokens, num_steps, latent_frames)
        return dataclasses.replace(
            recipe,
            schedule=schedule or recipe.schedule,
            schedules=recipe.schedules if schedule is None else {},
        )
    if spec.method is not None and schedule is not None:
        return Recipe(method=spec.method, schedule=schedule, source="user")
    auto = spec.name == "auto"
    if auto:
        recipe = recipe_for(pipe, tokens, num_steps=num_steps, latent_frames=latent_frames)
    else:
        kind: Literal["svg1", "svg2"] = "svg1" if spec.name == "svg1" else "svg2"
        recipe = _nearest_published(pipe, tokens, kind)
    if spec.name == "svg2-published":
        recipe = _as_published(pipe, tokens)
    recipe = dataclasses.replace(recipe, schedule=schedule or recipe.schedule)
    if spec.method is not None or spec.name == "dense":
        method = spec.build(recipe.method)
        return dataclasses.replace(recipe, method=method, source="user", note="")
    if isinstance(recipe.method, Dense) and (
        not auto or spec.density or spec.top_p or spec.changes_clusters
    ):
        counts = cluster_counts(tokens, SHARED.q_clusters, SHARED.k_clusters)
        base = SVG2(q_clusters=counts[0], k_clusters=counts[1], **ROUNDS)
        return dataclasses.replace(recipe, method=spec.build(base), note="")
    return dataclasses.replace(recipe, method=spec.build(recipe.method))


@checks_names({"num_inference_steps": "num_steps"})
def recipe_for(
    pipe: object,
    tokens: int,
    *,
    num_steps: int | None = None,
    latent_frames: int | None = None,
    method: Literal["svg1", "svg2"] = "svg2",
) -> Recipe:
    """Choose settings and schedule for a pipeline and a clip.

    Args:
        pipe: a diffusers pipeline of a known family, or its transformer.
        tokens: video tokens of the clip: frames times rows times columns after patching.
        num_steps: denoising steps, if known.
        latent_frames: frames of the latents, if known.
        method: which method to choose settings for.

    Returns:
        The method with the nearest published settings, adjusted where model or clip is smaller;
        `Dense()` with a note for single frames, clips too short and runs too few-stepped to gain.
        Models as small as those that the preset `balanced` was measured on get that, in runs of few
        steps, too.

    Raises:
        ValueError: if the family or the method is unknown, or `tokens` is not positive.
    """
    tokens = as_whole("tokens", tokens)
    if tokens < 1:
        raise ValueError(f"tokens must be positive, got {tokens}")
    if method not in ("svg1", "svg2"):
        raise ValueError(f"recipes are for method 'svg1' or 'svg2', got {method!r}")
    family, task, width = _kind(pipe)
    row = nearest(family.recipes, task, tokens)
    preset = asked = find_row("balanced", steps=num_steps, tokens=tokens, width=width)
    if method == "svg1" or preset is None or not 0 < width <= preset.automatic:
        preset = None
    dense = _why_dense(tokens, width, latent_frames)
    # Few steps are no reason to stay dense where they were measured on models as small.
    if not dense and preset is None and num_steps is not None and num_steps <= FEW_STEPS:
        dense = _why_few_steps(num_steps, asked)
    if dense:
        return Recipe(method=Dense(), schedule=row.schedule, source=row.source, note=dense)
    if preset is not None:
        return _with_counts(preset, row, tokens)
    return _nearest_published(pipe, tokens, method)


def _nearest_published(pipe: object, tokens: int, method: Literal["svg1", "svg2"]) -> Recipe:
    """Return the nearest published settings, adjusted where model or clip is smaller."""
    family, task, width = _kind(pipe)
    row = nearest(family.recipes, task, tokens)
    dense = _why_dense(tokens, width, None)
    if dense:
        return Recipe(method=Dense(), schedule=row.schedule, source=row.source, note=dense)
    adjusted, words = (_svg1 if method == "svg1" else _svg2)(row, tokens, width)
    known = bool(family.recipes) and (row.task, row.tokens) == (task, tokens)
    note = (
        f"nearest published settings, those of {row.title} ({row.tokens:,} tokens), for "
        f"{tokens:,} tokens with {words}"
    )
    exact = known and row.width in (0, width)
    return Recipe(
        method=adjusted, schedule=row.schedule, source=row.source, note="" if exact else note
    )


def _of_preset(
    name: str, pipe: object, tokens: int, num_steps: int | None, latent_frames: int | None
) -> Recipe:
    """Return what a preset comes to for a clip; dense, with a note, where it has nothing for it."""
    family, task, width = _kind(pipe)
    published = nearest(family.recipes, task, tokens)
    row = find_row(name, steps=num_steps, tokens=tokens, width=width)
    note = _why_dense(tokens, width, latent_frames)
    if row is None and not note:
        note = (
            f"preset {name} has no settings yet for {num_steps} denoising steps of such a clip; "
            "pass a method to run it anyway"
        )
    if note or row is None:
        return Recipe(
            method=Dense(), schedule=published.schedule, source=f"preset {name}", note=note
        )
    return _with_counts(row, published, tokens)


def _with_counts(row: PresetRow, published: Published, tokens: int) -> Recipe:
    """Return the recipe of a row, its missing numbers of clusters those for the clip."""
    method = row.recipe.method
    if isinstance(method, SVG2):
        counts = cluster_counts(tokens, published.q_clusters, published.k_clusters)
        method = dataclasses.replace(
            method,
            q_clusters=method.q_clusters or counts[0],
            k_clusters=method.k_clusters or counts[1],
        )
    return dataclasses.replace(row.recipe, method=method)


def _as_published(pipe: object, tokens: int) -> Recipe:
    """Return the nearest published settings of SVG2, fewer clusters in a short clip all changed."""
    family, task, _ = _kind(pipe)
    row = nearest(family.recipes, task, tokens)
    return Recipe(method=_published(row, tokens), schedule=row.schedule, source=row.source)


def _kind(pipe: object) -> tuple[Family, str, int]:
    """Return family, task and width of a pipeline."""
    transformer = next(iter(transformers_of(pipe).values()))
    family = family_of(transformer)
    return family, family.task(transformer), _width(transformer)


def nearest(rows: tuple[Published, ...], task: str, tokens: int) -> Published:
    """Return the published row for the clip size nearest to `tokens`.

    Args:
        rows: published settings of the family; empty for `SHARED`.
        task: rows of this task come first.
        tokens: video tokens of the clip.

    Returns:
        One of the rows.
    """
    same_task = [row for row in rows if row.task == task] or rows or (SHARED,)
    return min(same_task, key=lambda row: abs(math.log(row.tokens / tokens)))


def _published(row: Published, tokens: int) -> SVG2:
    q_clusters, k_clusters = cluster_counts(tokens, row.q_clusters, row.k_clusters)
    return SVG2(
        q_clusters=q_clusters, k_clusters=k_clusters, top_p=row.top_p, min_keep=row.min_keep
    )


def _svg2(row: Published, tokens: int, width: int) -> tuple[Method, str]:
    method = dataclasses.replace(_published(row, tokens), **ROUNDS)
    words = f"{method.q_clusters} query and {method.k_clusters} key clusters"
    if tokens >= SMALL * row.tokens and (not width or width >= SMALL * row.width):
        return method, words
    # Fewer tokens make fewer and coarser clusters and a smaller model has fewer heads, so what is
    # left out weighs more; users report so for 480p and for models of 1.3B. The means that stand in
    # for it cost little. They serve spread-out attention well, so an equal budget for every tile
    # beats one that follows the mass: on the embedded model 33.7 dB against 23.6 at a third of the
    # pairs. Routing by error comes to 37.8, but it scores every key, which on a GPU takes three
    # quarters of the attention's own time.
    method = dataclasses.replace(method, density=SMALL_DENSITY, compensate=True)
    return method, f"{words}, density {SMALL_DENSITY} and compensation"


def _svg1(row: Published, tokens: int, width: int) -> tuple[Method, str]:
    # A shorter sequence keeps the band as wide in tokens as it was published, up to a limit.
    widened = min(LARGEST_SVG1_DENSITY, row.svg1_density * row.tokens / tokens)
    method = SVG1(density=max(row.svg1_density, widened))
    return method, f"density {method.density:.2f}"


def _why_dense(tokens: int, width: int, latent_frames: int | None) -> str:
    if latent_frames == 1:
        return (
            "a single frame is an image, for which no sparse settings were published; "
            "pass a method to run it anyway"
        )
    # Per token and layer, attention costs 4 * tokens * width operations and the linear layers about
    # 28 * width^2: below 1.75 * width tokens attention is under a fifth of the work.
    needed = max(SMALLEST_SEQUENCE, math.ceil(SMALLEST_SHARE * width))
    if tokens < needed:
        return (
            f"a clip of {tokens:,} tokens is too short to gain from sparse attention in this model "
            f"({needed:,} or more needed); pass a method to run it anyway"
        )
    return ""


def _why_few_steps(num_steps: int, row: PresetRow | None) -> str:
    """Return why so few steps stay dense unless asked for, and what the preset came to."""
    note = (
        f"{num_steps} denoising step{' is' if num_steps == 1 else 's are'} too few to make sparse "
        f"by default (more than {FEW_STEPS} needed): each of them decides too much; pass a method "
        "to run it anyway"
    )
    if row is None:
        return note
    note += ", or the preset balanced"
    for one in row.recipe.measured[:1]:
        if one.psnr is not None and one.work is not None:
            note += (
                f": {one.psnr:.1f} dB to dense with {one.work:.0%} of the attention "
                f"({one.model}, {one.steps} steps, guidance {one.guidance:g})"
            )
    return note


def _width(transformer: nn.Module) -> int:
    config = getattr(transformer, "config", None)
    heads = getattr(config, "num_attention_heads", 0)
    return int(heads * getattr(config, "attention_head_dim", 0))
