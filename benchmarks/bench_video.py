"""Time whole videos: every kind of denoising step, decoding and memory, and the published run.

    python benchmarks/bench_video.py run --output benchmarks/results/h100
    python benchmarks/bench_video.py run --models "14b, 720p" --variants diffusers SVG2
    python benchmarks/bench_video.py run --models 1.3b --every-step
    python benchmarks/bench_video.py table --gpu h100
    python benchmarks/bench_video.py run --tiny --output tiny    # toy models on a CPU

The pipelines are diffusers' own, with the shapes of published models, random weights, the prompt
given as embeddings and guidance as published. A run of few steps shows what a step costs before
attention is sparse, where it begins and after; the seconds of a published run are those times as
often as its schedule asks for, plus what comes before the first step and decoding. `--every-step`
runs all of them and stores what the sum of the parts would have said beside it.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _harness import ROOT, conditions, environment, load, replace_between, store, table
from _video_subjects import SEED, TINY, VIDEOS, Video

from svg_attention import SVG2, Dense, Method, Schedule
from svg_models import sparsify

STOCK = "diffusers"
SHORT = 3  # steps of a run whose steps all cost the same
DENSITY = 0.25
PAGE = ROOT / "docs" / "speed.md"
PICTURE = ROOT / "docs" / "assets" / "video-seconds.png"
PARTS = ("start", "dense steps", "first sparse step", "sparse steps", "decoding")
COLOURS = ("#8c8c8c", "#4477aa", "#ee8866", "#66aa77", "#bbbbbb")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run a pipeline.

    Attributes:
        name: for people.
        method: what attention computes; None leaves the pipeline as it is.
        options: what else `sparsify` is given.
        compiled: whether the blocks are compiled first.
        quantised: whether the linear layers are converted to fp8 by torchao first, for good.
    """

    name: str
    method: Callable[[Video], Method] | None = None
    options: Mapping[str, Any] | None = None
    compiled: bool = False
    quantised: bool = False


def svg2(video: Video) -> Method:
    """Return SVG2 at the density that is measured."""
    queries, keys = video.clusters
    return SVG2(q_clusters=queries, k_clusters=keys, density=DENSITY)


# What changes the pipeline for good stands last.
VARIANTS = (
    Variant(name=STOCK),
    Variant(name="dense steps", method=lambda video: Dense()),
    Variant(name="SVG2", method=svg2),
    Variant(name="SVG2, fp8 products", method=svg2, options={"linears": "fp8"}),
    Variant(name=f"{STOCK}, compiled", compiled=True),
    Variant(name="SVG2, compiled", method=svg2, compiled=True),
    Variant(name=f"{STOCK}, torchao fp8", quantised=True),
    Variant(name="SVG2, torchao fp8", method=svg2, quantised=True),
)


class Steps:
    """Stamp the end of every denoising step, and time decoding, from outside of a pipeline."""

    def __init__(self, pipe: Any, device: str) -> None:
        self.pipe, self.device = pipe, device
        self.ends: list[float] = []
        self.decoding = 0.0

    def now(self) -> float:
        """Return the time after everything on the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __enter__(self) -> Steps:
        self._step, self._decode = self.pipe.scheduler.step, self.pipe.vae.decode

        def step(*args: Any, **kwargs: Any) -> Any:
            done = self._step(*args, **kwargs)
            self.ends.append(self.now())
            return done

        def decode(*args: Any, **kwargs: Any) -> Any:
            begin = self.now()
            done = self._decode(*args, **kwargs)
            self.decoding = self.now() - begin
            return done

        self.pipe.scheduler.step, self.pipe.vae.decode = step, decode
        return self

    def __exit__(self, *_: object) -> None:
        del self.pipe.scheduler.step, self.pipe.vae.decode


def schedule_of(video: Video) -> Schedule:
    """Return the published schedule."""
    return Schedule(dense_steps=video.dense_steps, dense_layers=video.dense_layers)


@contextmanager
def running(pipe: Any, video: Video, variant: Variant) -> Iterator[Any]:
    """Make a pipeline sparse for a while, as a variant says."""
    if variant.method is None:
        yield None
        return
    options = dict(variant.options or {})
    with sparsify(pipe, variant.method(video), schedule_of(video), seed=SEED, **options) as run:
        yield run


def take(pipe: Any, video: Video, variant: Variant, steps: int, device: str) -> dict[str, Any]:
    """Run a clip of `steps` steps and return the seconds of its parts."""
    arguments = dict(video.arguments) | video.embeddings(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        run = stack.enter_context(running(pipe, video, variant))
        stamps = stack.enter_context(Steps(pipe, device))
        begin = stamps.now()
        out = pipe(
            **arguments,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(SEED),
            output_type="pt",
        ).frames
        end = stamps.now()
        if not torch.isfinite(torch.as_tensor(out)).all():
            raise RuntimeError(f"{video.name}, {variant.name}: the video is not finite")
        messages = [] if run is None else list(run.messages)
        density = None if run is None else run.stats().mean_density
    lasted = [b - a for a, b in zip(stamps.ends, stamps.ends[1:], strict=False)]
    dense = math.floor(video.dense_steps * steps) if variant.method is not None else steps
    if variant.method is not None and isinstance(variant.method(video), Dense):
        dense = steps
    # The first step has start-up in it (the pipeline's own, and a first launch of every kernel), so
    # a run has at least two dense steps and the first is left out where there is another.
    first = stamps.ends[0] - begin
    kinds: dict[str, list[float]] = {"dense": lasted[: dense - 1] or [first]}
    if dense < steps:
        kinds["first sparse"] = [lasted[dense - 1] if dense else first]
        kinds["sparse"] = lasted[dense:] or kinds["first sparse"]
    seconds = {kind: statistics.median(values) for kind, values in kinds.items()}
    return {
        "steps": steps,
        "dense_steps": dense,
        "start": max(0.0, first - seconds["dense"]),
        "seconds_of_steps": [first, *lasted],
        "seconds_per_step": seconds,
        "decoding": stamps.decoding,
        "whole": end - begin,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        "density": density,
        "messages": messages,
    }


def published(video: Video, variant: Variant, taken: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of the parts of a published run, from what steps cost."""
    step = taken["seconds_per_step"]
    dense = video.steps
    if "sparse" in step:
        dense = math.floor(video.dense_steps * video.steps)
    rest = max(0, video.steps - dense - 1)
    sparse = "sparse" in step
    return {
        # The first step of a process has the start of every kernel in it, whatever runs.
        "start": taken["start"],
        "dense steps": dense * step["dense"],
        "first sparse step": step["first sparse"] if sparse else 0.0,
        "sparse steps": rest * step["sparse"] if sparse else 0.0,
        "decoding": taken["decoding"],
    }


def prepare(pipe: Any, variant: Variant, device: str) -> None:
    """Compile or quantise the transformers, where a variant asks for it."""
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        if model is None:
            continue
        if variant.compiled:
            compiler = "inductor" if device == "cuda" else "aot_eager"
            model.compile_repeated_blocks(fullgraph=True, backend=compiler)
        else:
            for module in model.modules():
                module._compiled_call_impl = None
        if variant.quantised and not getattr(model, "_bench_quantised", False):
            from torchao.quantization import (
                Float8DynamicActivationFloat8WeightConfig,
                PerRow,
                quantize_,
            )

            config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
            quantize_(model, config, filter_fn=_in_a_block)
            model._bench_quantised = True


def _in_a_block(module: torch.nn.Module, path: str) -> bool:
    """Return whether a module is a bf16 linear layer of a transformer block."""
    return (
        isinstance(module, torch.nn.Linear)
        and "blocks." in path
        and module.weight.dtype == torch.bfloat16
    )


def measure(
    video: Video, names: Sequence[str], args: argparse.Namespace, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Time a video in every variant; yield what is known after each."""
    device = "cpu" if args.tiny else "cuda"
    begin = time.perf_counter()
    pipe = video.build(device)
    built = time.perf_counter() - begin
    billions = sum(p.numel() for p in pipe.transformer.parameters()) / 1e9
    say(f"{video.name}: built in {built:.0f} s, {billions:.1f} B parameters a transformer")
    row: dict[str, Any] = {
        "name": video.name,
        "published_steps": video.steps,
        "grid": video.grid,
        "arguments": dict(video.arguments),
        "dense_steps": video.dense_steps,
        "dense_layers": video.dense_layers,
        "clusters": video.clusters,
        "built_s": built,
        "variants": {},
    }
    for variant in [v for v in VARIANTS if v.name in names]:
        prepare(pipe, variant, device)
        if variant.compiled:  # the first clip compiles
            warm = take(pipe, video, variant, 3, device)["whole"]
            say(f"{video.name}, {variant.name}: compiled in a clip of {warm:.0f} s")
        steps = video.steps if args.every_step else args.steps
        if variant.method is None and not args.every_step:
            steps = min(steps, SHORT)
        taken = take(pipe, video, variant, steps, device)
        parts = published(video, variant, taken)
        row["variants"][variant.name] = taken | {"published": parts}
        shown = {kind: round(s, 2) for kind, s in taken["seconds_per_step"].items()}
        say(
            f"{video.name}, {variant.name}: {shown} s a step, decoding {taken['decoding']:.1f} s, "
            f"{video.steps} steps {sum(parts.values()):.0f} s"
        )
        yield row
    del pipe
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def run(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    result: dict[str, Any] = {} if args.tiny else {"environment": environment(args.commit)}
    result |= {"density": DENSITY, "every_step": args.every_step, "videos": []}

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {text}", flush=True)

    for video in TINY if args.tiny else VIDEOS:
        if args.models and not any(word.lower() in video.name.lower() for word in args.models):
            continue
        others = list(result["videos"])
        for row in measure(video, args.variants, args, say):
            result["videos"] = [*others, row]
            store(args.output / f"{args.name}.json", result)
    say("done")


def rows_of(video: Mapping[str, Any]) -> list[list[str]]:
    """Return the lines of one video, in the order in which its variants ran."""
    lines = []
    stock = video["variants"].get(STOCK)
    for name, taken in video["variants"].items():
        step = taken["seconds_per_step"]
        whole = sum(taken["published"].values())
        faster = sum(stock["published"].values()) / whole if stock else None
        lines.append(
            [
                f"{video['name']}, {video['published_steps']} steps",
                name,
                *(f"{step[kind]:.2f}" if kind in step else "" for kind in step_kinds()),
                f"{taken['decoding']:.1f}",
                f"{whole:,.0f}",
                f"{faster:.2f}" if faster else "",
                f"{taken['peak_gb']:.0f}" if taken["peak_gb"] else "",
            ]
        )
    return lines


def step_kinds() -> tuple[str, str, str]:
    """Return the kinds of steps in the order in which they come."""
    return "dense", "first sparse", "sparse"


def written(result: Mapping[str, Any]) -> str:
    """Return the table and its conditions."""
    head = [
        *("video", "attention", "s a dense step", "first sparse step", "sparse step"),
        *("s decoding", "s in all", "times faster", "peak GB"),
    ]
    lines = [line for video in result["videos"] for line in rows_of(video)]
    return table(head, lines) + (
        f"\nSparse attention at {result['density']:.0%} density; the first "
        f"{result['videos'][0]['dense_steps']:.0%} of the steps and "
        f"{result['videos'][0]['dense_layers']:.0%} of the layers dense, as published. Random "
        "weights, prompt embeddings given, guidance as published. Seconds in all are "
        + ("measured.\n" if result["every_step"] else "those of the steps, as often as they run.\n")
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw one bar for each way of making each video, its parts stacked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = [
        (f"{video['name']}\n{name}", taken["published"])
        for video in result["videos"]
        for name, taken in video["variants"].items()
    ]
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.55 * len(bars)))
    for place, (_, parts) in enumerate(bars):
        left = 0.0
        for part, colour in zip(PARTS, COLOURS, strict=True):
            axes.barh(place, parts[part], left=left, color=colour, label=None if place else part)
            left += parts[part]
        axes.text(left, place, f" {left:,.0f} s", va="center")
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("seconds for the whole video")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_table(gpu: str, name: str) -> None:
    result = load(gpu, name)
    replace_between(PAGE, "videos", f"{conditions(result['environment'])}\n\n{written(result)}")
    draw(result, PICTURE)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "h100")
    parser.add_argument("--gpu", default="h100", help="folder of the stored result")
    parser.add_argument("--name", default="video", help="name of the stored result")
    parser.add_argument("--models", nargs="*", default=[], help="words in the names of the videos")
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variants", nargs="*", default=names, choices=names)
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of a sparse run")
    parser.add_argument("--every-step", action="store_true", help="run all published steps")
    parser.add_argument(
        "--tiny", action="store_true", help="toy models on the CPU, to try the code"
    )
    parser.add_argument("--commit", help="recorded where there is no git")
    args = parser.parse_args(arguments)
    if args.action == "run":
        run(args)
    else:
        write_table(args.gpu, args.name)


if __name__ == "__main__":
    main()
