"""Time whole videos: every kind of denoising step, decoding and memory, and the published run.

    python benchmarks/bench_video.py run --output benchmarks/results/h100 --models "14b, 720p"
    python benchmarks/bench_video.py run --output benchmarks/results/h100 --models 1.3b --every-step
    python benchmarks/bench_video.py plan                        # what it would take, in seconds
    python benchmarks/bench_video.py table --gpu h100
    python benchmarks/bench_video.py run --tiny --output tiny    # toy models on a CPU

The pipelines are diffusers' own, with the shapes of published models, random weights and the prompt
given as embeddings. A part is a short run that shows what one kind of step costs: stock, before
attention is sparse, where it begins, after. A guided step makes two forward passes that compute the
same; a part makes one and counts it twice, unless the branches read alike. The seconds of a
published run are those of its steps, as often as its schedule has them, with what comes before the
first and decoding. `--every-step` runs all steps, guided, and stores the seconds beside that sum.

Parts are stored as they are measured, and one that is stored is not measured again, so that a
machine that is lent for minutes is used in turns. `--seconds` leaves out what would not be done in
time.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _harness import (
    RESULTS,
    ROOT,
    UNAVAILABLE,
    conditions,
    environment,
    load,
    reason,
    replace_between,
    store,
    table,
)
from _video_subjects import SEED, TINY, VIDEOS, Video

from svg_attention import SVG2, Dense, Method, Schedule
from svg_models import sparsify
from svg_models.families import family_of, transformers_of
from svg_models.recipes import ROUNDS

DENSITY = 0.25
PAGES = (ROOT / "docs" / "speed.md", ROOT / "README.md")
PICTURE = ROOT / "docs" / "assets" / "video-seconds.png"
STOCK, DENSE, FIRST, SPARSE = ("stock", "dense", "first sparse", "sparse")
OUT = "left out"  # by a cache
# What a step of a kind is expected to take, relative to one of diffusers.
EXPECTED = {STOCK: 1.0, DENSE: 0.8, FIRST: 0.85, SPARSE: 0.43, OUT: 0.02}
COMPILING = 60.0
QUANTISING = 8.0
WARMING = 3.0
BUILDING = 10.0
LONG = 20.0
COLOURS = {
    "start": "#8c8c8c",
    "dense steps": "#4477aa",
    "first sparse step": "#ee8866",
    "sparse steps": "#66aa77",
    "decoding": "#bbbbbb",
}


def svg2(video: Video) -> Method:
    """Return SVG2 at the density that is measured, its k-means as in recipes."""
    queries, keys = video.clusters
    return SVG2(
        q_clusters=queries,
        k_clusters=keys,
        density=DENSITY,
        **ROUNDS,
    )


def corrected(video: Video) -> Method:
    """Return SVG2 with every correction that pays, for runs without a dense step."""
    queries, keys = video.clusters
    # Of a toy, probes and exact rows read more than a quarter.
    density = DENSITY if math.prod(video.grid) > 5000 else 0.9
    return SVG2.corrected(density, q_clusters=queries, k_clusters=keys)


def dense(video: Video) -> Method:
    """Return dense attention by our kernels."""
    return Dense()


@dataclass(frozen=True, kw_only=True)
class Part:
    """A short run that shows what kinds of steps cost.

    Attributes:
        name: under which it is stored.
        kinds: of its steps, in order.
        method: what attention computes; None leaves the pipeline as it is.
        linears: whether products are in fp8.
        attention: whether attention is, where heads have 128 channels.
        compiled: whether the blocks are compiled first.
        quantised: whether torchao converts the linear layers first, for good.
        guided: whether its steps are guided, since its branches do not compute the same.
        cache: see `svg_models.sparsify`.
    """

    name: str
    kinds: tuple[str, ...]
    method: Callable[[Video], Method] | None = None
    linears: bool = False
    attention: bool = False
    compiled: bool = False
    quantised: bool = False
    guided: bool = False
    cache: str | None = None

    def steps(self, video: Video) -> tuple[str, ...]:
        """Return the kinds of the steps of a run; a pass of half a minute is its own average."""
        if video.pass_s <= LONG or self.cache is not None:
            return self.kinds
        return tuple(dict.fromkeys(self.kinds))

    def expected(self, video: Video, factor: float) -> float:
        """Return the seconds that this part is expected to take."""
        passes = video.passes if self.guided else 1
        work = passes * sum(EXPECTED[kind] for kind in self.steps(video)) * video.pass_s * factor
        seconds = WARMING + work + (video.decode_s if self.method is None else 0.0)
        if self.compiled:  # the same run compiles
            seconds += COMPILING + work
        return seconds + (QUANTISING if self.quantised else 0.0)


# In the order of their worth; what changes the pipeline for good stands last.
PARTS = (
    Part(name="diffusers", kinds=(STOCK, STOCK)),
    Part(name="SVG2", kinds=(DENSE, FIRST, SPARSE, SPARSE), method=svg2),
    Part(
        name="SVG2, fp8",
        kinds=(DENSE, FIRST, SPARSE, SPARSE),
        method=svg2,
        linears=True,
        attention=True,
    ),
    Part(name="SVG2, fp8 products", kinds=(FIRST, SPARSE, SPARSE), method=svg2, linears=True),
    Part(
        name="SVG2 corrected, fp8",
        kinds=(FIRST, SPARSE),
        method=corrected,
        linears=True,
        attention=True,
        guided=True,
    ),
    Part(name="diffusers, compiled", kinds=(STOCK,), compiled=True),
    Part(name="diffusers, torchao fp8", kinds=(STOCK,), quantised=True),
)
# Asked for by name; stands before what changes the pipeline for good.
MORE = (
    Part(name="SVG2, compiled", kinds=(FIRST, SPARSE), method=svg2, compiled=True),
    Part(
        name="SVG2, fp8, taylor@2",
        kinds=(FIRST, SPARSE, SPARSE, OUT, SPARSE, OUT, SPARSE),
        method=svg2,
        linears=True,
        attention=True,
        cache="taylor@2",
    ),
)
ALL_PARTS = (*PARTS[:-1], *MORE, PARTS[-1])


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run that is put together from parts.

    Attributes:
        name: for people.
        dense: part whose steps run before attention is sparse, and their kind.
        sparse: part whose steps run after; None if none is sparse.
        steps: denoising steps; None for the published number.
        warm: share of the steps that stay dense; None for the published one.
        fp8: for people: what is in fp8.
        cached: part whose cache leaves steps out.
    """

    name: str
    dense: tuple[str, str] | None
    sparse: str | None = None
    steps: int | None = None
    warm: float | None = None
    fp8: str = ""
    cached: str | None = None

    @property
    def stock(self) -> str:
        """Name of the row of diffusers with as many steps."""
        return "diffusers" if self.steps is None else f"diffusers, {self.steps} steps"


FP8, FEW = "SVG2, fp8", "SVG2 corrected, fp8"
BOTH = "products and attention"
ROWS = (
    Row(name="diffusers", dense=("diffusers", STOCK)),
    Row(name="diffusers, compiled", dense=("diffusers, compiled", STOCK)),
    Row(name="diffusers, torchao fp8", dense=("diffusers, torchao fp8", STOCK), fp8="products"),
    Row(name="dense", dense=("SVG2", DENSE)),
    Row(name="SVG2", dense=("SVG2", DENSE), sparse="SVG2"),
    Row(name="SVG2, compiled", dense=("SVG2", DENSE), sparse="SVG2, compiled"),
    Row(
        name="SVG2, fp8 products",
        dense=("SVG2", DENSE),
        sparse="SVG2, fp8 products",
        fp8="products of sparse steps",
    ),
    Row(name="SVG2, fp8", dense=("SVG2", DENSE), sparse=FP8, fp8=f"{BOTH} of sparse steps"),
    Row(name="SVG2, fp8 from the start", dense=(FP8, DENSE), sparse=FP8, fp8=f"{BOTH}, all steps"),
    Row(
        name="SVG2, fp8, taylor@2",
        dense=("SVG2", DENSE),
        sparse=FP8,
        fp8=f"{BOTH} of sparse steps",
        cached="SVG2, fp8, taylor@2",
    ),
    Row(name="no dense step, fp8", dense=None, sparse=FEW, warm=0.0, fp8=f"{BOTH}, all steps"),
    Row(name="diffusers, 8 steps", dense=("diffusers", STOCK), steps=8),
    Row(name="8 sparse steps, fp8", dense=None, sparse=FEW, steps=8, warm=0.0, fp8=BOTH),
    Row(name="diffusers, 4 steps", dense=("diffusers", STOCK), steps=4),
    Row(name="4 sparse steps, fp8", dense=None, sparse=FEW, steps=4, warm=0.0, fp8=BOTH),
)
MASKED = (
    " HunyuanVideo 1.5 in diffusers masks the padding of its text in every layer, for which torch "
    "has no fast kernel; sparsify cuts the padding off, in dense steps too."
)
WHOLE = ("diffusers", "SVG2", "SVG2, fp8")
"""Rows that `--every-step` runs."""


class Watch:
    """Time every forward pass, step and decoding of a pipeline, from outside of it.

    Args:
        pipe: the pipeline.
        device: where it runs.
        schedule: which steps stay dense; None if nothing else than stock runs.
        method: what attention computes.
        steps: denoising steps of the run.
    """

    def __init__(
        self, pipe: Any, device: str, schedule: Schedule | None, method: Method | None, steps: int
    ) -> None:
        self.pipe, self.device = pipe, device
        self.schedule, self.method, self.num_steps = schedule, method, steps
        self.steps: list[dict[str, Any]] = [{"passes": []}]
        self.first_began = self.last_ended = self.decoding = 0.0
        self.peak_denoising = 0
        self._began = 0.0
        self._seen: set[str] = set()
        self._undo = ExitStack()

    def now(self) -> float:
        """Return the time after everything on the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __enter__(self) -> Watch:
        for name, model in transformers_of(self.pipe).items():
            self._undo.callback(model.register_forward_pre_hook(self._before, prepend=True).remove)
            self._undo.callback(model.register_forward_hook(self._after(name)).remove)
        step, decode = self.pipe.scheduler.step, self.pipe.vae.decode

        def stepped(*args: Any, **kwargs: Any) -> Any:
            done = step(*args, **kwargs)
            self.last_ended = self.now()
            self.steps.append({"passes": []})
            return done

        def decoded(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            if self.device == "cuda" and not self.decoding:
                self.peak_denoising = torch.cuda.max_memory_allocated()
            done = decode(*args, **kwargs)
            self.decoding += self.now() - began
            return done

        self.pipe.scheduler.step, self.pipe.vae.decode = stepped, decoded
        self._undo.callback(delattr, self.pipe.scheduler, "step")
        self._undo.callback(delattr, self.pipe.vae, "decode")
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _before(self, *_: Any) -> None:
        self._began = self.now()
        self.first_began = self.first_began or self._began

    def _after(self, name: str) -> Callable[..., None]:
        def after(*_: Any) -> None:
            step = self.steps[-1]
            step["passes"].append(self.now() - self._began)
            step["transformer"] = name
            if len(step["passes"]) == 1:
                step["kind"] = self._kind(name, len(self.steps) - 1)

        return after

    def _kind(self, name: str, step: int) -> str:
        """Return the kind of a step in which a transformer runs."""
        if self.method is None or self.schedule is None:
            return STOCK
        if isinstance(self.method, Dense) or self.schedule.is_dense(
            step=step, num_steps=self.num_steps, layer=1, num_layers=1
        ):
            return DENSE
        first = name not in self._seen
        self._seen.add(name)
        return FIRST if first else SPARSE

    def taken(self, video: Video) -> dict[str, Any]:
        """Return the seconds of every step, and of a guided step of each kind."""
        steps = [step for step in self.steps if step["passes"]]
        passed = sum(sum(step["passes"]) for step in steps)
        # What a step takes beside its passes: the scheduler, guidance.
        between = max(0.0, self.last_ended - self.first_began - passed) / len(steps)
        found = {"steps": steps, "between": between}
        return found | {"seconds_per_step": step_seconds(found, video.passes)}


def step_seconds(taken: Mapping[str, Any], passes: int) -> dict[str, float]:
    """Return the seconds of a guided step of each kind.

    The first step of a run has the start of a process at a new size in it, so it does not count
    where there is another of its kind.

    Args:
        taken: of a run.
        passes: of a guided step.
    """
    by_kind: dict[str, list[float]] = {}
    for step in taken["steps"]:
        seconds = passes / len(step["passes"]) * sum(step["passes"])
        by_kind.setdefault(step["kind"], []).append(seconds)
    first = by_kind[taken["steps"][0]["kind"]]
    if len(first) > 1:
        del first[0]
    return {kind: statistics.median(seconds) for kind, seconds in by_kind.items()}


class Bench:
    """One video, built when it is first needed.

    Args:
        video: what to time.
        device: where.
    """

    def __init__(self, video: Video, device: str) -> None:
        self.video, self.device = video, device
        self.built = 0.0
        self._pipe: Any = None

    @property
    def pipe(self) -> Any:
        """The pipeline, with random weights."""
        if self._pipe is None:
            begin = time.perf_counter()
            self._pipe = self.video.build(self.device)
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.built = time.perf_counter() - begin
        return self._pipe

    def close(self) -> None:
        """Give the memory back."""
        self._pipe = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    @property
    def wide_heads(self) -> bool:
        """Whether attention can gain from fp8: its kernel computes 128 channels."""
        return self.device == "cpu" or int(self.pipe.transformer.config.attention_head_dim) == 128

    def options(self, part: Part) -> dict[str, Any]:
        """Return what `sparsify` is given beside method and schedule."""
        given: dict[str, Any] = {"seed": SEED}
        if part.cache is not None:
            given["cache"] = part.cache
        if part.linears:
            given["linears"] = "fp8"
        if part.attention and self.wide_heads:
            given["attention"] = "fp8"
            if self.device == "cpu":
                given["backend"] = "reference"
        if "linears" in given or "attention" in given:
            given["fp8_from"] = "start"
        return given

    def run(
        self,
        part: Part,
        steps: int,
        schedule: Schedule,
        *,
        guided: bool,
        decode: bool,
        frames: int | None = None,
        options: Mapping[str, Any] | None = None,
        watch: Callable[..., Watch] = Watch,
    ) -> dict[str, Any]:
        """Run a clip and return the seconds of its parts, and what `watch` sees besides."""
        video, pipe, device = self.video, self.pipe, self.device
        arguments = dict(video.arguments) | video.embeddings(device)
        guider = getattr(pipe, "guider", None)
        with ExitStack() as stack:
            if not guided and video.unguided is not None:
                changes = dict(video.unguided)
                scale = changes.pop("guider", None)
                arguments |= changes
                if scale is not None:
                    pipe.guider = guider.new(guidance_scale=scale)
                    stack.callback(setattr, pipe, "guider", guider)
            if frames is not None:
                arguments["num_frames"] = frames
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            stack.enter_context(torch.no_grad())
            method = None if part.method is None else part.method(video)
            run = None
            if method is not None:
                given = self.options(part) if options is None else dict(options)
                run = stack.enter_context(sparsify(pipe, method, schedule, **given))
            seen = stack.enter_context(watch(pipe, device, schedule, method, steps))
            begin = seen.now()
            out = pipe(
                **arguments,
                num_inference_steps=steps,
                generator=torch.Generator("cpu").manual_seed(SEED),
                output_type="pt" if decode else "latent",
            ).frames
            end = seen.now()
            if not torch.isfinite(torch.as_tensor(out)).all():
                raise RuntimeError(f"{video.name}, {part.name}: the video is not finite")
            stats = None if run is None else run.stats()
            if part.cache is not None and stats is not None:
                computed = {record.step for record in stats.records}
                for number, step in enumerate(seen.steps):
                    if step["passes"] and number not in computed:
                        step["kind"] = OUT
            messages = [] if run is None else list(run.messages)
        return seen.taken(video) | {
            "guided": guided,
            "start": seen.first_began - begin,
            "decoding": end - seen.last_ended if decode else None,
            "vae": seen.decoding if decode else None,
            "whole": end - begin,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
            "peak_denoising_gb": seen.peak_denoising / 1e9 or None,
            "density": None if stats is None else stats.mean_density,
            "fp8_calls": None if stats is None else stats.fp8_calls,
            "calls": None if stats is None else stats.calls,
            "messages": messages,
        }

    def measure(self, part: Part) -> dict[str, Any]:
        """Warm up and time a part."""
        video, kinds = self.video, part.steps(self.video)
        count = len(kinds)
        schedule = Schedule(dense_steps=kinds.count(DENSE) / count, dense_layers=video.dense_layers)
        prepare(self.pipe, part, self.device)
        guided = part.guided or video.unguided is None
        how: dict[str, Any] = {"guided": guided}
        if part.cache is not None:
            if len(transformers_of(self.pipe)) > 1:
                raise ValueError("which steps a cache leaves out is known of one transformer only")
            schedule = Schedule.sparse()
        if part.compiled:  # at the size that is measured, since shapes are compiled in
            began = time.perf_counter()
            self.run(part, count, schedule, decode=False, **how)
            compiled = {"compiling": time.perf_counter() - began}
        else:
            decode = part.method is None and not part.quantised
            self.run(part, 2, schedule, decode=decode, frames=video.brief, **how)
            compiled = {}
        decode = part.method is None and not part.compiled and not part.quantised
        taken = self.run(part, count, schedule, decode=decode, **how) | compiled
        found = tuple(step["kind"] for step in taken["steps"])
        if part.cache is not None and [k == OUT for k in found] != [k == OUT for k in kinds]:
            raise RuntimeError(f"{part.name} left out other steps than expected: {found}")
        return taken

    def measure_whole(self, row: Row) -> dict[str, Any]:
        """Run every step of a row, guided, as published."""
        video = self.video
        part = next(p for p in PARTS if p.name == (row.sparse or (row.dense or ("",))[0]))
        prepare(self.pipe, part, self.device)
        options = self.options(part)
        options.pop("fp8_from", None)  # dense steps are not in fp8
        schedule = Schedule(dense_steps=video.dense_steps, dense_layers=video.dense_layers)
        return self.run(part, video.steps, schedule, guided=True, decode=True, options=options)


def prepare(pipe: Any, part: Part, device: str) -> None:
    """Compile or quantise the transformers, where a part asks for it."""
    for model in transformers_of(pipe).values():
        if part.compiled:
            torch._dynamo.reset()
            compiler = "inductor" if device == "cuda" else "aot_eager"
            for block in family_of(model).blocks_of(model):  # some models name none as repeated
                block.compile(fullgraph=True, backend=compiler)
        else:
            for module in model.modules():
                module._compiled_call_impl = None
        if part.quantised:
            from torchao.quantization import (
                Float8DynamicActivationFloat8WeightConfig,
                PerRow,
                quantize_,
            )

            config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
            quantize_(model, config, filter_fn=_in_a_block)


def _in_a_block(module: torch.nn.Module, path: str) -> bool:
    """Return whether a module is a bf16 linear layer of a transformer block."""
    return (
        isinstance(module, torch.nn.Linear)
        and "blocks." in path
        and module.weight.dtype == torch.bfloat16
    )


def seconds_of(stored: Mapping[str, Any], row: Row) -> dict[str, float] | None:
    """Return the seconds of the parts of a row, or None if a part of it is not measured.

    Args:
        stored: what is known of a video.
        row: which run.
    """
    parts = stored["parts"]
    steps = row.steps or stored["published_steps"]
    first = parts.get("diffusers")
    if not is_measured(first):
        return None

    def cost(part: str, kind: str) -> float | None:
        taken = parts.get(part)
        if not is_measured(taken):
            return None
        seconds = step_seconds(taken, stored["passes"]).get(kind)
        return None if seconds is None else float(seconds + taken["between"])

    warm = stored["dense_steps"] if row.warm is None else row.warm
    before = steps if row.sparse is None else math.floor(warm * steps)
    out = [row.cached is not None and is_left_out(step) for step in range(steps)]
    after = steps - before - sum(out[before:])
    left = sum(out)
    before -= sum(out[:before])
    starts = 0 if row.sparse is None else min(stored["transformers"], after)
    after -= starts
    amounts = [(before, *row.dense) if row.dense else (0, "", "")]
    amounts += [(starts, row.sparse, FIRST), (after, row.sparse, SPARSE)] if row.sparse else []
    found = []
    for count, part, kind in amounts:
        one = cost(part, kind) if count else 0.0
        if one is None:
            return None
        found.append(count * one)
    if row.cached is not None:
        one = cost(row.cached, OUT)
        if one is None:
            return None
        found[2] += left * one
    found += [0.0] * (3 - len(found))
    return {
        "start": first["start"],
        "dense steps": found[0],
        "first sparse step": found[1],
        "sparse steps": found[2],
        "decoding": first["decoding"],
    }


def is_left_out(step: int) -> bool:
    """Return whether the cache "taylor@2" leaves a step out: behind three, every second one."""
    return step >= 3 and step % 2 == 1


def run_whole(stored: Mapping[str, Any], row: Row) -> dict[str, float] | None:
    """Return the seconds of the parts of a row whose every step was run; None for another."""
    taken = stored["whole"].get(row.name)
    if row.steps is not None or not is_measured(taken):
        return None
    sums = dict.fromkeys((STOCK, DENSE, FIRST, SPARSE), 0.0)
    for step in taken["steps"]:
        sums[step["kind"]] += sum(step["passes"]) + taken["between"]
    return {
        "start": taken["start"],
        "dense steps": sums[STOCK] + sums[DENSE],
        "first sparse step": sums[FIRST],
        "sparse steps": sums[SPARSE],
        "decoding": taken["decoding"],
    }


def known(stored: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of every row of which all parts are measured."""
    sums = {row.name: seconds_of(stored, row) for row in ROWS}
    return {name: sum(parts.values()) for name, parts in sums.items() if parts is not None}


def describe(video: Video) -> dict[str, Any]:
    """Return what a video is, for the stored result."""
    return {
        "name": video.name,
        "published_steps": video.steps,
        "passes": video.passes,
        "transformers": 1,
        "grid": video.grid,
        "arguments": dict(video.arguments),
        "dense_steps": video.dense_steps,
        "dense_layers": video.dense_layers,
        "clusters": video.clusters,
        "parts": {},
        "whole": {},
    }


def is_measured(taken: Mapping[str, Any] | None) -> bool:
    """Return whether a part is stored and had not failed."""
    return taken is not None and "unavailable" not in taken


def factor_of(stored: Mapping[str, Any], video: Video) -> float:
    """Return how much slower than expected this machine is, as far as it has been seen."""
    taken = stored["parts"].get("diffusers")
    if not is_measured(taken):
        return 1.0
    return step_seconds(taken, video.passes)[STOCK] / (video.passes * video.pass_s)


def whole_seconds(stored: Mapping[str, Any], video: Video, row: str) -> float:
    """Return what all steps of a row are expected to take."""
    share = 1.0 if row == "diffusers" else 0.55
    guess = share * video.steps * video.passes * video.pass_s * factor_of(stored, video)
    return known(stored).get(row, guess + video.decode_s)


@dataclass
class Budget:
    """Seconds that may be used.

    Attributes:
        seconds: in all; infinity for as long as it takes.
        began: when.
    """

    seconds: float
    began: float = field(default_factory=time.perf_counter)

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"{time.perf_counter() - self.began:6.1f} s  {text}", flush=True)

    def has(self, expected: float, what: str) -> bool:
        """Return whether something may still begin; say so if not."""
        left = self.seconds - (time.perf_counter() - self.began)
        if expected <= left:
            self.say(f"{what}: {expected:.0f} s expected")
            return True
        self.say(f"{what}: left out, {expected:.0f} s expected and {left:.0f} s are left")
        return False


def attempt(work: Callable[[], dict[str, Any]], budget: Budget, what: str) -> dict[str, Any]:
    """Return what a measurement gives, or why there is none."""
    try:
        return work()
    except (torch.OutOfMemoryError, *UNAVAILABLE) as error:
        why = reason(error)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    budget.say(f"{what}: {why}")
    return {"unavailable": why}


def measure(
    video: Video, stored: dict[str, Any], args: argparse.Namespace, budget: Budget
) -> Iterator[None]:
    """Time what is not known of a video; yield after each part."""
    bench = Bench(video, "cpu" if args.tiny else "cuda")
    env = {} if args.tiny else environment(args.commit)

    def missing(known: Mapping[str, Any], name: str) -> bool:
        return args.again or not is_measured(known.get(name))

    def keep(place: dict[str, Any], name: str, work: Callable[[], dict[str, Any]]) -> None:
        what = f"{video.name}, {name}"
        taken = attempt(work, budget, what)
        place[name] = taken | {"environment": env}
        if not is_measured(taken):
            return
        stored["transformers"] = len(transformers_of(bench.pipe))
        shown = {kind: round(s, 3) for kind, s in taken["seconds_per_step"].items()}
        peak = "" if taken["peak_gb"] is None else f", peak {taken['peak_gb']:.1f} GB"
        budget.say(f"{what}: {shown} s a guided step{peak}")

    todo = [p for p in ALL_PARTS if p.name in args.parts and missing(stored["parts"], p.name)]
    whole = [row for row in ROWS if row.name in WHOLE and args.every_step]
    todo = [] if args.every_step else todo
    if todo or whole:
        try:
            _ = bench.pipe
        except (torch.OutOfMemoryError, *UNAVAILABLE) as error:
            budget.say(f"{video.name}: {reason(error)}")
            bench.close()
            return
        stored["built_s"] = bench.built
        billions = sum(p.numel() for p in bench.pipe.transformer.parameters()) / 1e9
        budget.say(f"{video.name}: built in {bench.built:.1f} s, {billions:.1f} B a transformer")
    for part in todo:
        expected = part.expected(video, factor_of(stored, video))
        if budget.has(expected, f"{video.name}, {part.name}"):
            keep(stored["parts"], part.name, lambda part=part: bench.measure(part))
            yield
    for row in whole:
        if not missing(stored["whole"], row.name):
            continue
        expected = whole_seconds(stored, video, row.name)
        if budget.has(expected, f"{video.name}, {row.name}, every step"):
            keep(stored["whole"], row.name, lambda row=row: bench.measure_whole(row))
            sums = known(stored)
            if row.name in sums and "whole" in stored["whole"][row.name]:
                stored["whole"][row.name]["predicted"] = sums[row.name]
                budget.say(
                    f"{video.name}, {row.name}: {stored['whole'][row.name]['whole']:.1f} s, "
                    f"{sums[row.name]:.1f} s from its parts"
                )
            yield
    sums = known(stored)
    for row in (row for row in ROWS if row.name in sums):
        faster = sums[row.stock] / sums[row.name]
        budget.say(f"{video.name}, {row.name}: {sums[row.name]:,.0f} s, {faster:.2f} times")
    bench.close()


def chosen(args: argparse.Namespace) -> list[Video]:
    """Return the videos that were asked for."""
    words = [word.lower() for word in args.models]
    videos = TINY if args.tiny else VIDEOS
    return [v for v in videos if not words or any(word in v.name.lower() for word in words)]


def read(path: Path) -> dict[str, Any]:
    """Return the stored result; an empty one if there is none."""
    if path.exists():
        result: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return result
    return {"density": DENSITY, "videos": []}


def plan(args: argparse.Namespace) -> float:
    """Print what a run is expected to take, part by part; return the seconds."""
    result = read(args.output / f"{args.name}.json")
    total = 0.0
    for video in chosen(args):
        stored = next((v for v in result["videos"] if v["name"] == video.name), describe(video))
        factor = factor_of(stored, video)
        lines = {
            part.name: part.expected(video, factor)
            for part in ALL_PARTS
            if part.name in args.parts and not args.every_step
            if args.again or not is_measured(stored["parts"].get(part.name))
        }
        if args.every_step:
            lines = {
                f"{name}, every step": whole_seconds(stored, video, name)
                for name in WHOLE
                if args.again or not is_measured(stored["whole"].get(name))
            }
        if not lines:
            continue
        lines = {"building": BUILDING} | lines
        total += sum(lines.values())
        told = ", ".join(f"{name} {seconds:.0f}" for name, seconds in lines.items())
        print(f"{video.name}: {sum(lines.values()):.0f} s ({told})", flush=True)
    print(f"{total:.0f} s expected in all", flush=True)
    return total


def run(args: argparse.Namespace) -> None:
    """Measure and store."""
    budget = Budget(seconds=args.seconds)
    path = args.output / f"{args.name}.json"
    plan(args)
    if args.tiny:
        let_a_cpu_have_fp8()
    result = read(path)
    for video in chosen(args):
        stored = next((v for v in result["videos"] if v["name"] == video.name), None)
        if stored is None:
            stored = describe(video)
            result["videos"].append(stored)
        for _ in measure(video, stored, args, budget):
            store(path, result)
    store(path, result)
    budget.say("done")


def let_a_cpu_have_fp8() -> None:
    """Have toys compute in fp8, too: torch multiplies e4m3 on a CPU."""
    from svg_models.sparse import layers, linears

    layers.refuse_device = lambda device: None  # type: ignore[assignment]
    linears.LEAST_ROWS = 1


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
    return " ".join(dict.fromkeys(conditions(env) for env in told if env))


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
        "Random weights, prompt embeddings given, decoding included. Seconds in all are those of "
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
    """Fill the tables and draw the picture; nothing is there while nothing is stored."""
    path = RESULTS / args.gpu / f"{args.name}.json"
    result = load(args.gpu, args.name) if path.exists() else {"videos": []}
    if not any(rows_of(video) for video in result["videos"]):
        for page in PAGES:
            replace_between(page, "videos", "")
        return
    picture = f"![Seconds of a video, stock and sparse](assets/{PICTURE.name})"
    text = f"{picture}\n\n{machines(result)}\n\n{written(result)}"
    replace_between(PAGES[0], "videos", text)
    replace_between(PAGES[1], "videos", f"{short(result)}\n\n{machines(result)}")
    draw(result, PICTURE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["run", "plan", "table"])
    parser.add_argument("--output", type=Path, default=RESULTS / "h100")
    parser.add_argument("--name", default="videos", help="of the stored file")
    parser.add_argument("--gpu", default="h100", help="whose result becomes the table")
    parser.add_argument("--models", nargs="*", default=[], help="words of the names to run")
    usual, names = ([part.name for part in parts] for parts in (PARTS, ALL_PARTS))
    parser.add_argument("--parts", nargs="*", default=usual, choices=names)
    parser.add_argument("--seconds", type=float, default=math.inf, help="leave out what takes more")
    parser.add_argument("--every-step", action="store_true", help="run all published steps")
    parser.add_argument("--again", action="store_true", help="measure what is stored, too")
    parser.add_argument("--tiny", action="store_true", help="toys on the CPU, to try the code")
    parser.add_argument("--commit", help="recorded where there is no git")
    args = parser.parse_args(arguments)
    {"run": run, "plan": plan, "table": write_table}[args.action](args)


if __name__ == "__main__":
    main()
