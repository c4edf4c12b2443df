"""Generate the same clip dense and sparse, and show how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from svg_models.comparison.candidate import Candidate
from svg_models.comparison.gain import WORTH, gains_from
from svg_models.comparison.machine import CoreTimes, machine_facts, others_at_work
from svg_models.comparison.result import Comparison
from svg_models.comparison.timing import judge
from svg_models.generation.conditioning import Media
from svg_models.generation.decoding import warn_if_unlike
from svg_models.generation.request import CompareRequest, takes
from svg_models.generation.sample import prepare, sample
from svg_models.generation.settings import Settings
from svg_models.loading import LoadedPipeline, Progress
from svg_models.method_names import MethodSpec
from svg_models.video import similarity

__all__ = ["compare"]


@takes(CompareRequest)
def compare(request: CompareRequest) -> Comparison:
    """Generate one clip dense and by each method, from the same noise.

    Takes the fields of `CompareRequest` as keywords, the prompt also by position; all but `methods`
    and `density` are as `generate` takes them. A short run before the first clip loads kernels and
    fills caches, so that no clip pays for them. Speeds come from some sparse steps of each clip,
    each timed beside the same step dense; where these disagree, or the machine was busy with other
    work, there are none and `no_speed` says why.

        compare("a red circle", methods=["svg2@0.2", SVG1(density=0.3)]).save("out")

    Returns:
        The clips with their similarity to the dense one.

    Raises:
        SettingError, ModelUnavailableError, MachineError, UnsupportedError: as `generate`.
    """
    specs = request.specs
    loaded, settings, media = prepare(request, *specs)
    computed, progress = request.computed, request.report
    plan = (MethodSpec(name="dense"), *specs)
    _warm_up(loaded, settings, media, plan, request)
    how: dict[str, Any] = {"media": media, "profile": True}
    clips = []
    before = CoreTimes.now()
    for index, spec in enumerate(plan, start=1):
        step = _named(progress, f"{index} of {len(plan)}  {spec.slug}")
        beside = spec.name != "dense"
        how["computed"] = computed if beside else request.computed_dense
        clips.append(sample(loaded, settings, spec, progress=step, beside_dense=beside, **how))
    on_gpu = loaded.device.startswith("cuda")
    threads = 1 if on_gpu else torch.get_num_threads()
    others = others_at_work(before, CoreTimes.now(), threads=threads)
    dense, *sparse = clips
    timing = judge(sparse, others=others)
    candidates = []
    for clip, speed in zip(sparse, timing.speeds, strict=True):
        progress("measuring", 0, 0)
        warn_if_unlike(clip.tiles, dense.tiles)
        close = similarity(clip.frames, dense.frames, device=loaded.device)
        candidates.append(Candidate(clip=clip, similarity=close, speed=speed))
    return Comparison(
        dense=dense,
        candidates=tuple(candidates),
        machine=machine_facts(loaded, computed),
        no_speed=timing.reason,
        gains_from=_gains_from(loaded, candidates, progress),
    )


def _gains_from(loaded: LoadedPipeline, candidates: Sequence[Candidate], progress: Progress) -> str:
    """Return at which size this machine would gain, if this clip is too short to."""
    timed = [(c.speed.speedup, c) for c in candidates if c.speed is not None]
    if not timed:
        return ""
    speedup, best = max(timed, key=lambda pair: pair[0])
    if speedup >= WORTH:
        return ""
    progress("looking for the size that gains", 0, 0)
    return gains_from(loaded, best)


def _named(progress: Progress, name: str) -> Progress:
    def report(stage: str, done: float, total: float) -> None:
        progress(f"{name}: {stage}", done, total)

    return report


def _warm_up(
    loaded: LoadedPipeline,
    settings: Settings,
    media: Media,
    plan: Sequence[MethodSpec],
    request: CompareRequest,
) -> None:
    request.report("warming up", 0, 0)
    strength = None if settings.strength is None else 1.0
    # Kernels that are compiled at first use belong to the methods; a CPU has none.
    for spec in plan if loaded.device.startswith("cuda") else plan[:1]:
        dense = spec.name == "dense"
        steps, computed = 1 if dense else 2, request.computed_dense if dense else request.computed
        brief = settings.replace(steps=steps, strength=strength)
        sample(loaded, brief, spec, media=media, computed=computed)
