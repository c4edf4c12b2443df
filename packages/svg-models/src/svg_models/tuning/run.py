"""Tune a recipe: generate, measure, choose, and say what it came to."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from svg_models.caching import NO_CACHE, can_cache
from svg_models.comparison.machine import CoreTimes, machine_facts, others_at_work
from svg_models.comparison.timing import judge
from svg_models.families import transformers_of
from svg_models.generation.clip import Clip
from svg_models.generation.conditioning import Media
from svg_models.generation.decoding import warn_if_unlike
from svg_models.generation.other_kernel import other_dense_kernel
from svg_models.generation.request import takes
from svg_models.generation.sample import prepare, sample
from svg_models.generation.settings import Settings
from svg_models.loading import LoadedPipeline
from svg_models.method_names import MethodSpec
from svg_models.recipe import Layers, Measured, Recipe
from svg_models.tuning.fit import FITTED, Fit, fit, trials_of_a_fit
from svg_models.tuning.journal import Journal, Trial, key_of
from svg_models.tuning.request import TuneRequest
from svg_models.tuning.result import Tuned
from svg_models.tuning.search import SCOUTS, Outcome, OutOfTime, Search, Target, most_trials
from svg_models.tuning.space import START, Point, axes_for
from svg_models.video import Spread, similarity

__all__ = ["tune"]

EXAMPLES = 3
"""Prompts of the embedded model where none are given."""


@takes(TuneRequest)
def tune(request: TuneRequest) -> Tuned:
    """Search the settings of a recipe that keep a budget of quality or of time.

    Takes the fields of `TuneRequest` as keywords; those of the model and the clip are as `generate`
    takes them. Each trial generates a clip and compares it with the dense clip of the same noise.
    With a `journal` the search goes on where it was stopped.

        tuned = tune(psnr=32, model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", prompts=["a fox", "a boat"])
        tuned.recipe.save("recipe.json")

    Returns:
        The recipe, if one keeps the budget, and everything that was measured.

    Raises:
        SettingError, ModelUnavailableError, MachineError, UnsupportedError: as `generate`.
        OutputError: if the journal cannot be written.
    """
    journal = Journal(request.journal)
    loaded, settings, media = prepare(request, MethodSpec(name="auto"))
    return _Tuner(request, journal, loaded, settings, media).run()


class _Tuner:
    """One search on one model."""

    def __init__(
        self,
        request: TuneRequest,
        journal: Journal,
        loaded: LoadedPipeline,
        settings: Settings,
        media: Media,
    ) -> None:
        self._request, self._journal, self._loaded = request, journal, loaded
        self._settings, self._media = settings, media
        self._prompts = _prompts(request, loaded, settings)
        self._layers = Layers().changed(**request.layers)
        self._machine = machine_facts(loaded, request.computed)
        self._dense_clips: dict[int, Clip] = {}
        self._trials: dict[tuple[Point | None, int], Trial] = {}
        self._warm: set[tuple[Any, ...]] = set()
        self._began = time.monotonic()
        self._most = most_trials(len(self._prompts)) + len(self._prompts) + 1
        self._fit: Fit | None = None
        if request.fit:
            self._most += trials_of_a_fit(settings.steps_to_run)

    def run(self) -> Tuned:
        """Search, and say what was found."""
        request = self._request
        target = Target(
            psnr=request.psnr, cost=None if request.speedup is None else 1 / request.speedup
        )
        steps = self._settings.steps_to_run
        axes = axes_for(steps, cached=self._can_cache(), guided=self._settings.guidance > 1.0)
        if request.fit:
            with contextlib.suppress(OutOfTime):
                self._fit = self._measure_fit(steps)
                axes = {**axes, "schedule": (*axes["schedule"], *FITTED)}
        search = Search(target, self._evaluate, prompts=len(self._prompts), axes=axes)
        point = search.run()
        floor = self._noise_floor()
        closest = search.closest()
        return Tuned(
            recipe=None if point is None else self._recipe(point, floor),
            point=point,
            target=target,
            closest=None if closest is None else closest[0],
            trials=tuple(t for (p, _), t in self._trials.items() if p is not None),
            prompts=tuple(self._prompts),
            settings=self._settings,
            model=self._loaded.name,
            loras=tuple(str(lora) for lora in self._loaded.loras),
            tokens=self._tokens,
            noise_floor=floor,
            machine=self._machine,
            time_by=request.time_by,
            fit=self._fit,
        )

    def _measure_fit(self, steps: int) -> Fit:
        """Return what steps and layers cost on the first prompt."""

        def psnr(name: str, density: float) -> float | None:
            return self._trial(START.replace(density=density, only=name), 0).psnr

        layers = 1 + max(record.layer for record in self._dense(0).stats.records)
        return fit(psnr, density=START.density, scouts=SCOUTS, steps=steps, layers=layers)

    def _can_cache(self) -> bool:
        """Return whether caches are among what is tried: not where one was asked for already."""
        if self._layers.cache != NO_CACHE:
            return False
        return all(can_cache(model) for model in transformers_of(self._loaded.pipe).values())

    @property
    def _tokens(self) -> int:
        settings = self._settings
        return self._loaded.geometry.tokens(
            height=settings.height, width=settings.width, frames=settings.frames
        )

    def _evaluate(self, point: Point, count: int) -> Outcome:
        trials = [self._trial(point, index) for index in range(count)]
        return Outcome(
            psnr=float(np.mean([math.inf if t.psnr is None else t.psnr for t in trials])),
            cost=float(np.mean([t.cost for t in trials])),
        )

    def _trial(self, point: Point, index: int) -> Trial:
        made = self._trials.get((point, index))
        if made is not None:
            return made
        conditions = self._conditions(index)
        if point.schedule in FITTED:  # which another first prompt would give other numbers
            conditions["fit"] = None if self._fit is None else dataclasses.asdict(self._fit)
        key = key_of(conditions, point)
        trial = self._journal.get(key)
        if trial is None:
            self._check_time()
            trial = self._measure(point, index)
            self._journal.add(key, trial)
            self._request.say(self._sentence(trial))
        self._trials[point, index] = trial
        return trial

    def _check_time(self) -> None:
        minutes = self._request.budget_minutes
        if minutes is not None and time.monotonic() - self._began > 60 * minutes:
            raise OutOfTime

    def _sentence(self, trial: Trial) -> str:
        quality = "identical" if trial.psnr is None else f"{trial.psnr:.1f} dB"
        cost = f"{trial.work:.0%} of the attention"
        if trial.seconds is not None and trial.dense_seconds:
            cost += f", {trial.dense_seconds / trial.seconds:.2f}x as fast as dense"
        elif trial.doubt:
            cost += f", not timed: {trial.doubt}"
        return f"{trial.point}: {quality}, {cost} (prompt {trial.prompt + 1})"

    def _measure(self, point: Point, index: int) -> Trial:
        dense = self._dense(index)
        spec = MethodSpec.of_recipe(point.recipe(self._layers, self._fit))
        # A step is not timed twice beside a cache, to which it would be two: blocks that are left
        # out are counted, and those that are not take the time that they take without it.
        without = None
        timed = self._request.time_by == "seconds" and not point.only
        if timed and point.cache != NO_CACHE:
            without, timed = self._trial(point.replace(cache=NO_CACHE), index), False
        if timed:
            self._warm_up(point)
        clip, speed, doubt = self._timed(spec, index, str(point), timed=timed)
        if doubt:  # once more, since whatever it was may have passed
            clip, speed, doubt = self._timed(spec, index, str(point), timed=timed)
        warn_if_unlike(clip.tiles, dense.tiles)
        close = similarity(clip.frames, dense.frames, device=self._loaded.device)
        stats, seconds = clip.stats, None
        computed = stats.calls / dense.stats.calls
        work = computed * (stats.mean_density_with_dense_calls + stats.mean_probe_density)
        share = None
        if clip.paired_steps:
            part = sum(step.dense_attention for step in clip.paired_steps)
            share = part / sum(step.dense_seconds for step in clip.paired_steps)
        if speed is not None:
            seconds = len(clip.step_seconds) * speed.dense_step
        took = None if seconds is None or speed is None else seconds / speed.speedup
        if without is not None:
            seconds, share, doubt = without.dense_seconds, without.share, without.doubt
            took = None if without.seconds is None else computed * without.seconds
        return Trial(
            point=point,
            prompt=index,
            psnr=close.mean_psnr if math.isfinite(close.mean_psnr) else None,
            ssim=close.mean_ssim,
            flip=close.mean_flip,
            flicker=close.mean_flicker,
            work=work,
            seconds=took,
            dense_seconds=seconds,
            doubt=doubt,
            share=share,
            computed=computed,
        )

    def _timed(
        self, spec: MethodSpec, index: int, name: str, *, timed: bool
    ) -> tuple[Clip, Any, str]:
        """Generate a clip; return it, its speed if one can be claimed, and if not, why."""
        before = CoreTimes.now()
        clip = self._sample(spec, index, name, profile=timed, beside_dense=timed)
        if not timed:
            return clip, None, ""
        others = others_at_work(before, CoreTimes.now(), threads=self._machine["threads"] or 1)
        timing = judge([clip], others=others)
        return clip, timing.speeds[0], timing.reason

    def _warm_up(self, point: Point) -> None:
        """Have kernels compiled that no trial shall pay for; a CPU has none."""
        kind = (point.corrections, point.probe_rows, point.metric)
        if kind in self._warm or not self._loaded.device.startswith("cuda"):
            return
        self._warm.add(kind)
        brief = self._settings_of(0).replace(
            steps=2, strength=None if self._settings.strength is None else 1.0
        )
        spec = MethodSpec.of_recipe(point.replace(schedule="flat").recipe(self._layers))
        how: dict[str, Any] = {"media": self._media, "computed": self._request.computed}
        sample(self._loaded, brief, spec, **how)

    def _dense(self, index: int) -> Clip:
        if index not in self._dense_clips:
            spec = MethodSpec(name="dense")
            self._dense_clips[index] = self._sample(spec, index, "dense")
        return self._dense_clips[index]

    def _noise_floor(self) -> float | None:
        """Return the PSNR of dense attention by another kernel; None if it was not measured."""
        conditions = self._conditions(0)
        trial = self._journal.get(key_of(conditions, None))
        if trial is None:
            if 0 not in self._dense_clips:
                return None  # all trials come from the journal of a run that had no time for it
            self._check_nothing_left_to_do()
            with other_dense_kernel(self._loaded.pipe):
                clip = self._sample(
                    MethodSpec(name="dense"), 0, "dense by another kernel", exact_dense=True
                )
            close = similarity(clip.frames, self._dense(0).frames, device=self._loaded.device)
            trial = Trial(
                point=None,
                prompt=0,
                psnr=close.mean_psnr if math.isfinite(close.mean_psnr) else None,
                ssim=close.mean_ssim,
                flip=close.mean_flip,
                flicker=close.mean_flicker,
                work=1.0,
            )
            self._journal.add(key_of(conditions, None), trial)
        return trial.psnr

    def _check_nothing_left_to_do(self) -> None:
        """Show the bar as full but for this."""
        self._most = len(self._trials) + len(self._dense_clips) + 1

    def _sample(self, spec: MethodSpec, index: int, name: str, **how: Any) -> Clip:
        request = self._request
        done = len(self._trials) + len(self._dense_clips)
        most = max(self._most, done + 1)
        computed = request.computed_dense if spec.name == "dense" else request.computed
        if "exact_dense" in how:
            computed = computed | {"exact_dense": how.pop("exact_dense")}

        def progress(stage: str, part: float, whole: float) -> None:
            if stage == "sampling" and whole:
                request.report("tuning", done + part / whole, most)

        request.report("tuning", done, most)
        return sample(
            self._loaded,
            self._settings_of(index),
            spec,
            media=self._media,
            computed=computed,
            progress=progress,
            **how,
        )

    def _settings_of(self, index: int) -> Settings:
        settings = self._settings
        return settings.replace(prompt=self._prompts[index], seed=settings.seed + index)

    def _conditions(self, index: int) -> dict[str, Any]:
        """Return everything beside the point that a trial depends on."""
        return {
            "model": self._loaded.name,
            "loras": [str(lora) for lora in self._loaded.loras],
            "settings": dataclasses.asdict(self._settings_of(index)),
            "layers": dataclasses.asdict(self._layers),
            "timed": self._request.time_by == "seconds",
            "machine": self._machine,
        }

    def _recipe(self, point: Point, floor: float | None) -> Recipe:
        """Return the recipe of a point, with what it came to."""
        trials = [t for (p, _), t in self._trials.items() if p == point]
        spread = Spread.of([math.inf if t.psnr is None else t.psnr for t in trials])
        dense = sound = None
        if all(t.seconds is not None and t.dense_seconds for t in trials):
            dense = float(np.mean([t.dense_seconds for t in trials]))
            sound = dense * float(np.mean([t.cost for t in trials]))
        settings, machine = self._settings, self._machine
        names = ("torch", "diffusers", "svg-attention", "svg-models")
        measured = Measured(
            model=self._loaded.name,
            frames=settings.frames,
            height=settings.height,
            width=settings.width,
            tokens=self._tokens,
            steps=settings.steps_to_run,
            guidance=settings.guidance,
            prompts=len(trials),
            psnr=_short(spread.mean),
            psnr_spread=_short(spread.deviation),
            ssim=_short(_mean([t.ssim for t in trials])),
            flip=_short(_mean([t.flip for t in trials])),
            flicker=_short(_mean([t.flicker for t in trials])),
            noise_floor=_short(floor),
            work=_short(_mean([t.work for t in trials])),
            seconds=_short(sound),
            dense_seconds=_short(dense),
            machine=f"{machine['device']}, {machine['dtype']}",
            versions={name: str(machine[name]) for name in names},
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        )
        return dataclasses.replace(point.recipe(self._layers, self._fit), measured=(measured,))


def _prompts(request: TuneRequest, loaded: LoadedPipeline, settings: Settings) -> list[str]:
    if request.prompts:
        return list(request.prompts)
    if request.prompt is not None or loaded.name != "embedded":
        return [settings.prompt]
    from svg_models.embedded.defaults import SHEET_PROMPTS

    return list(SHEET_PROMPTS[:EXAMPLES])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
