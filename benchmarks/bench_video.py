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
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _harness import RESULTS, UNAVAILABLE, environment, named, reason, store, stored
from _video_parts import ALL_PARTS, DENSE, DENSITY, FIRST, OUT, PARTS, SPARSE, STOCK, Part
from _video_rows import ROWS, Row, is_measured, known, step_seconds
from _video_subjects import SEED, TINY, VIDEOS, Video
from _video_tables import write_table

from svg_attention import Dense, Method, Schedule
from svg_models import sparsify
from svg_models.families import family_of, transformers_of
from svg_models.stand_in import standing_in

BUILDING = 10.0
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
        self.num_layers: dict[str, int] = {}
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
            self.num_layers[name] = len(family_of(model).find_attentions(model))
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

        self._undo.enter_context(standing_in(self.pipe.scheduler, "step", stepped))
        self._undo.enter_context(standing_in(self.pipe.vae, "decode", decoded))
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
        if isinstance(self.method, Dense) or self.schedule.is_dense_throughout(
            step=step,
            num_steps=self.num_steps,
            num_layers=self.num_layers[name],
            own=getattr(self.method, "density", None),
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

    def build(self) -> None:
        """Build the pipeline now; nobody else holds it, who would keep its memory after `close`."""
        _ = self.pipe

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
            given["attention"] = part.attention
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
            self.run(part, 2, schedule, decode=part.decodes, frames=video.brief, **how)
            compiled = {}
        taken = self.run(part, count, schedule, decode=part.decodes, **how) | compiled
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
            bench.build()
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
    videos = TINY if args.tiny else VIDEOS
    names = named("video", [video.name for video in videos], args.models)
    return [video for video in videos if video.name in names]


def read(path: Path) -> dict[str, Any]:
    """Return the stored result; an empty one if there is none."""
    return stored(path) if path.exists() else {"density": DENSITY, "videos": []}


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
