"""Generate the same clip dense and sparse, and show how they differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from svg_models.comparison.machine import machine_facts
from svg_models.comparison.result import Candidate, Comparison
from svg_models.errors import SettingError
from svg_models.generation.conditioning import Media
from svg_models.generation.method_names import MethodSpec
from svg_models.generation.sample import prepare, sample
from svg_models.generation.settings import Settings
from svg_models.loading import LoadedPipeline, Progress, quiet
from svg_models.video import similarity

DEFAULT_METHODS = ("svg2", "svg2-comp", "svg2-error", "svg1")
DEFAULT_DENSITY = 0.25


def parse_methods(
    names: Sequence[str] | None, *, density: float | None = None
) -> tuple[MethodSpec, ...]:
    """Read the methods to compare, one budget for all that name none.

    Args:
        names: such as `"svg2"` or `"svg1@0.3"`; `None` or empty takes `DEFAULT_METHODS`.
        density: the budget; `None` takes `DEFAULT_DENSITY`, so that the table is fair.

    Raises:
        SettingError: if one is unknown, is dense or auto, or stands there twice.
    """
    budget = DEFAULT_DENSITY if density is None else density
    specs = tuple(MethodSpec.parse(name, density=budget) for name in names or DEFAULT_METHODS)
    if any(spec.name == "dense" for spec in specs):
        raise SettingError("dense is always part of a comparison; name the others")
    if any(spec.name == "auto" for spec in specs):
        raise SettingError("a comparison names its methods; auto is for svg generate alone")
    slugs = [spec.slug for spec in specs]
    twice = sorted({slug for slug in slugs if slugs.count(slug) > 1})
    if twice:
        raise SettingError(f"each method is compared once, got {', '.join(twice)} more than once")
    return specs


def compare(
    prompt: str | None = None,
    *,
    methods: Sequence[str | MethodSpec] | None = None,
    density: float | None = None,
    model: str | os.PathLike[str] | LoadedPipeline | None = None,
    image: str | os.PathLike[str] | None = None,
    video: str | os.PathLike[str] | None = None,
    loras: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "none",
    backend: str = "auto",
    progress: Progress = quiet,
    **settings: Any,
) -> Comparison:
    """Generate one clip dense and by each method, from the same noise.

    A short run before the first clip loads kernels and fills caches, so that no clip pays for
    them in the times that are compared.

    Args:
        prompt: what the clip shows; `None` takes the model's own example.
        methods: such as `"svg2"` or `"svg1@0.3"`; `None` takes `DEFAULT_METHODS`.
        density: share of query-key pairs computed on sparse calls by methods that name none.
        model: what `load_pipeline` takes, or a pipeline it returned.
        image: see `generate`.
        video: see `generate`.
        loras: see `generate`.
        device: see `load_pipeline`.
        dtype: see `load_pipeline`.
        offload: see `load_pipeline`.
        backend: kernel of the sparse attention, see `svg doctor`.
        progress: called as `progress(stage, done, total)`; the stage starts with the method.
        **settings: fields of `Settings`; what is missing or `None` comes from the model.

    Returns:
        The clips with their similarity to the dense one.

    Raises:
        SettingError, ModelUnavailableError, MachineError, UnsupportedError: as `generate`.
    """
    ready = [m for m in methods or () if isinstance(m, MethodSpec)]
    named = [m for m in methods or () if not isinstance(m, MethodSpec)]
    specs = tuple(ready) if ready and not named else parse_methods(named, density=density)
    loaded, wanted, media = prepare(
        prompt,
        model=model,
        image=image,
        video=video,
        loras=loras,
        device=device,
        dtype=dtype,
        offload=offload,
        progress=progress,
        **settings,
    )
    plan = (MethodSpec(name="dense"), *specs)
    _warm_up(loaded, wanted, media, plan, backend, progress)
    clips = []
    for index, spec in enumerate(plan, start=1):
        step = _named(progress, f"{index} of {len(plan)}  {spec.label}")
        clips.append(
            sample(loaded, wanted, spec, media=media, backend=backend, profile=True, progress=step)
        )
    dense = clips[0]
    candidates = []
    for clip in clips[1:]:
        progress("measuring", 0, 0)
        ratio = dense.seconds / clip.seconds if clip.seconds > 0 else 1.0
        close = similarity(clip.frames, dense.frames)
        candidates.append(Candidate(clip=clip, similarity=close, speedup=ratio))
    return Comparison(
        dense=dense, candidates=tuple(candidates), machine=machine_facts(loaded, backend)
    )


def _named(progress: Progress, name: str) -> Progress:
    def report(stage: str, done: float, total: float) -> None:
        progress(f"{name}: {stage}", done, total)

    return report


def _warm_up(
    loaded: LoadedPipeline,
    settings: Settings,
    media: Media,
    plan: Sequence[MethodSpec],
    backend: str,
    progress: Progress,
) -> None:
    import dataclasses

    progress("warming up", 0, 0)
    strength = None if settings.strength is None else 1.0
    # Kernels that are compiled at first use belong to the methods; a CPU has none.
    for spec in plan if loaded.device.startswith("cuda") else plan[:1]:
        steps = 1 if spec.name == "dense" else 2
        brief = dataclasses.replace(settings, steps=steps, strength=strength)
        sample(loaded, brief, spec, media=media, backend=backend)
