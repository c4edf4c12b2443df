"""Measure what fits on which card: peaks of a step and of decoding, and runs under a memory cap.

    python benchmarks/bench_memory.py run --seconds 180 --output benchmarks/results/h100/memory.json
    python benchmarks/bench_memory.py count --output benchmarks/results/h100/memory.json    # anew
    python benchmarks/bench_memory.py table --output benchmarks/results/h100/memory.json
    python benchmarks/bench_memory.py run --tiny --output tiny.json    # toys on a CPU, no numbers

A forward pass keeps nothing of a layer but its weights and, while attention is sparse, the
centroids of its clusters. So each model is built with three layers, what a pass and decoding take
beside these is measured, and weights and centroids of all layers are counted. What fits on a
card by this count is then run once more with a tensor in the place of what is missing, under a cap
as low as the card's memory, and on the next card if memory falls in pieces there. Text encoders are
counted, not built; layers that come to the GPU when they are needed are not run under a cap.

`run` goes on where the file ends, amid a model if need be, and begins nothing that would not be
done in `--seconds`. `count` needs no GPU: it counts weights anew and keeps what was measured; ways
that were run with less than they are now known to need are run again by the next `run`. `table`
fills the documentation and the table that `svg doctor -m MODEL` reads.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _harness import (
    UNAVAILABLE,
    conditions,
    environment,
    named,
    reason,
    replace_between,
    store,
    stored,
    table,
)
from _video_parts import DENSE, FIRST, FP8, PARTS, SPARSE, STOCK, Part, svg2
from _video_subjects import TINY, VIDEOS, Video
from _video_tables import PAGES
from bench_video import Bench, Budget, Watch, let_a_cpu_have_fp8

from svg_attention import Schedule
from svg_models.families import family_of, transformers_of
from svg_models.loading.memory import GIB
from svg_models.loading.placement import place
from svg_models.needs import CARDS, CONTEXT, TABLE
from svg_models.sparse.linears import is_plain_linear
from svg_models.stand_in import standing_in

# Seconds that a model is expected to take, and those of a pass of 14 billion parameters.
SECONDS, MORE_SECONDS = 20.0, 40.0
# A run that took less of what a way needs does not tell that it fits, and one that failed when it
# took as much more does not tell that it does not.
FULL = 0.99
# GiB of a card that a way leaves, to be said to fit where it was not run: with 1.2 runs failed,
# since free memory is in pieces, and with more only some whose weights are stored in fp8.
ROOM = 1.3
KINDS = (DENSE, FIRST, SPARSE)
PRODUCTS = next(part for part in PARTS if part.name == "SVG2, fp8 products")
STEPS = {
    "diffusers": Part(name="diffusers", kinds=(STOCK,)),
    "SVG2": Part(name="SVG2", kinds=KINDS, method=svg2),
    "SVG2, fp8 products": Part(name=PRODUCTS.name, kinds=KINDS, method=svg2, linears=True),
    FP8: Part(name=FP8, kinds=KINDS, method=svg2, linears=True, attention="fp8"),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to hold a model.

    Attributes:
        offload: see `svg generate --offload`.
        weights: how the transformer's are stored.
        steps: what runs, a name of `STEPS`.
    """

    offload: str
    weights: str
    steps: str

    @property
    def name(self) -> str:
        """For people and in the stored result."""
        return f"{self.steps}, offload {self.offload}, {self.weights}"


WAYS = (
    Way(offload="none", weights="bf16", steps="diffusers"),
    Way(offload="none", weights="bf16", steps="SVG2"),
    Way(offload="none", weights="bf16", steps="SVG2, fp8 products"),
    Way(offload="none", weights="fp8", steps="SVG2"),
    Way(offload="model", weights="bf16", steps="diffusers"),
    Way(offload="model", weights="bf16", steps="SVG2"),
    Way(offload="model", weights="fp8", steps="SVG2"),
    Way(offload="group", weights="bf16", steps="diffusers"),
    Way(offload="group", weights="bf16", steps="SVG2"),
)


class Memory:
    """The memory of the GPU; nothing on a CPU."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"

    def allocated(self) -> int:
        """Return the bytes that tensors take."""
        return torch.cuda.memory_allocated() if self.gpu else 0

    def peak(self) -> int:
        """Return the most bytes since `forget`."""
        return torch.cuda.max_memory_allocated() if self.gpu else 0

    def forget(self) -> None:
        """Count peaks from now on."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()

    def free(self) -> None:
        """Give back what nothing holds."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def cap(self, gib: float | None) -> None:
        """Let torch take so much at most; None for all."""
        if self.gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            share = 1.0 if gib is None else min(1.0, gib * GIB / total)
            torch.cuda.set_per_process_memory_fraction(share)

    def ballast(self, size: float) -> torch.Tensor:
        """Return a tensor of so many bytes."""
        count = int(size) if self.gpu else 0
        return torch.empty(max(0, count), dtype=torch.uint8, device="cuda" if self.gpu else "cpu")


class PeakWatch(Watch):
    """Take the peaks of denoising and of decoding apart."""

    memory: Memory
    found: dict[str, Any]

    def __enter__(self) -> PeakWatch:
        decode = self.pipe.vae.decode

        def decoded(*args: Any, **kwargs: Any) -> Any:
            self.found["denoising"] = self.memory.peak()
            before = self.memory.allocated()
            self.memory.forget()
            done = decode(*args, **kwargs)
            self.found["decoding"] = self.memory.peak() - before
            return done

        self._undo.enter_context(standing_in(self.pipe.vae, "decode", decoded))
        super().__enter__()
        return self


def measure_steps(bench: Bench, part: Part, memory: Memory, *, decode: bool) -> dict[str, Any]:
    """Run a part and return its peaks in bytes: denoising, and decoding beside what is held."""
    memory.free()
    memory.forget()
    found: dict[str, Any] = {"before": memory.allocated()}
    kinds = part.kinds

    def watch(*args: Any) -> PeakWatch:
        made = PeakWatch(*args)
        made.memory, made.found = memory, found
        return made

    schedule = Schedule(
        dense_steps=kinds.count(DENSE) / len(kinds), dense_layers=bench.video.dense_layers
    )
    guided = bench.video.unguided is None
    bench.run(part, len(kinds), schedule, guided=guided, decode=decode, watch=watch)
    found.setdefault("denoising", memory.peak())
    return found


def copied(pipe: Any) -> int:
    """Return the bytes that fp8 copies of weights take: those of the transformer that runs."""
    sizes = []
    for model in transformers_of(pipe).values():
        blocks = list(family_of(model).blocks_of(model))[1:-1]
        layers = (m for b in blocks for path, m in b.named_modules() if is_plain_linear(path, m))
        sizes.append(sum(layer.weight.numel() for layer in layers))
    return max(sizes)


def centroids(video: Video, pipe: Any) -> int:
    """Return the bytes that sparse attention keeps of all layers from step to step, in bf16.

    Of two transformers one is held at a time.
    """
    found = []
    for model in transformers_of(pipe).values():
        config = model.config
        # Whether guidance is a second sequence; a model that is told its scale has one alone.
        sequences = 1 if getattr(config, "guidance_embeds", False) else 2
        channels = config.num_attention_heads * config.attention_head_dim
        layers = len(list(family_of(model).blocks_of(model)))
        found.append(2 * sequences * layers * channels * sum(video.clusters))
    return max(found)


def weights(module: torch.nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(x.numel() * x.element_size() for x in tensors)


def store_in_fp8(pipe: Any) -> None:
    """Have diffusers store the transformers' weights in fp8, and cast a layer while it computes."""
    for model in transformers_of(pipe).values():
        model.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
        )


def cast_of(module: torch.nn.Module) -> int:
    """Return the bytes of the largest layer stored in fp8, while it computes in bf16."""
    held = (list(layer.parameters(recurse=False)) for layer in module.modules())
    return max(
        2 * sum(x.numel() for x in own)
        for own in held
        if any(x.dtype == torch.float8_e4m3fn for x in own)
    )


def describe(video: Video) -> dict[str, Any]:
    """Return the sizes of a whole model, which is not built: bytes of what it keeps."""
    pipe = video.build("meta")
    models = transformers_of(pipe).values()
    found = {
        "transformers": [weights(m) for m in models],
        "vae": weights(pipe.vae),
        "text": 2 * video.text,
        "copies": copied(pipe),
        "centroids": centroids(video, pipe),
    }
    # Which layers stay as they are differs by model: of some, the projections that modulate norms
    # do, a fifth to a third of a block.
    store_in_fp8(pipe)
    found["fp8"] = [weights(m) for m in models]
    found["cast"] = max(cast_of(m) for m in models)
    return found


def begin(video: Video, memory: Memory, device: str, budget: Budget) -> dict[str, Any]:
    """Measure what a model takes; no way to hold it has been run yet."""
    whole = describe(video)
    short = video.short
    bench = Bench(short, device)
    own_copies, own_centroids = copied(bench.pipe), measured_centroids(short, bench.pipe)
    found: dict[str, Any] = {}
    for name, part in STEPS.items():
        if part.attention and not bench.wide_heads:
            continue
        taken = measure_steps(bench, part, memory, decode=name == "diffusers")
        kept = own_copies * part.linears + own_centroids * (part.method is not None)
        found[name] = {
            # Beside weights, and what the few layers keep from step to step.
            "activations": taken["denoising"] - taken["before"] - kept,
            "kept": kept,
            "decoding": taken.get("decoding"),
        }
        budget.say(f"{video.name}, {name}: activations {gib(found[name]['activations'])}")
    bench.close()
    return {
        "name": video.name,
        "checkpoints": video.checkpoints,
        "clip": clip_of(video),
        "weights": whole,
        "activations": found,
        "grouped": measure_grouped(short, memory, device),
        "ways": {},
    }


def measure_way(
    video: Video, way: Way, model: Mapping[str, Any], memory: Memory, device: str
) -> dict[str, Any]:
    """Return what a way to hold a model needs, and on which card it has run.

    Args:
        video: the whole one.
        way: how it is held.
        model: what `begin` has found.
        memory: of the GPU.
        device: "cuda" or "cpu".
    """
    found = model["activations"]
    decoding = found["diffusers"]["decoding"]
    size = need(way, model["weights"], found, decoding, model["grouped"])
    peak = None
    if way.weights == "bf16":
        taken = found[way.steps]
        decoded = decoding if way.offload == "none" else 0
        peak = taken["kept"] + max(taken["activations"], decoded)
    runs: list[dict[str, Any]] = []
    for card in cards_by_count(size) if memory.gpu and way.offload != "group" else []:
        runs.append(run_capped(video.short, way, card, size, peak, memory, device))
        if runs[-1]["ran"]:
            break
    return {
        "offload": way.offload,
        "weights": way.weights,
        "steps": way.steps,
        "bytes": size,
        "card": card_of(size, runs),
        "runs": runs,
    }


def measured_centroids(video: Video, pipe: Any) -> int:
    """Return the bytes of centroids where one of the passes of a step is run."""
    return centroids(video, pipe) // video.passes


def need(
    way: Way,
    whole: Mapping[str, Any],
    found: Mapping[str, Any],
    decoding: float,
    grouped: Mapping[str, Any],
) -> float:
    """Return the bytes that a way of holding a model needs at its highest."""
    taken = found[way.steps]
    state = 0 if STEPS[way.steps].method is None else whole["centroids"]
    if way.offload == "group":
        return float(max(grouped[way.steps], decoding) + state)
    sizes, cast = whole["transformers"], 0
    if way.weights == "fp8":
        sizes, cast = whole["fp8"], whole["cast"]
    copies = whole["copies"] if STEPS[way.steps].linears else 0
    kept = copies + state  # while the VAE decodes, too
    if way.offload == "model":
        beside = max(max(sizes) + cast + taken["activations"], whole["vae"] + decoding)
        return float(max(beside + kept, whole["text"]))
    resident = sum(sizes) + whole["vae"] + whole["text"] + kept
    return float(resident + max(cast + taken["activations"], decoding))


def cards_by_count(size: float) -> list[int]:
    """Return the cards that so many bytes fit on, the smallest first."""
    return [card for card, total in CARDS.items() if size <= (total - CONTEXT) * GIB]


def outcomes(size: float, runs: Sequence[Mapping[str, Any]]) -> dict[int, bool]:
    """Return on which cards that so many bytes fit on it was run, and whether it ran."""
    fitting = cards_by_count(size)
    telling = (
        run
        for run in runs
        if (run["bytes"] >= FULL * size if run["ran"] else FULL * run["bytes"] <= size)
    )
    return {run["card"]: run["ran"] for run in telling if run["card"] in fitting}


def card_of(size: float, runs: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the smallest card that so many bytes ran on; without a run, that has `ROOM` beside."""
    ran = outcomes(size, runs)
    seen = [card for card, well in ran.items() if well]
    failed = max((card for card, well in ran.items() if not well), default=0)
    roomy = (card for card in cards_by_count(size + ROOM * GIB) if card > failed)
    return min(seen or roomy, default=None)


def is_settled(way: Mapping[str, Any]) -> bool:
    """Return whether each card was tried that a way fits on by count, up to one where it ran."""
    if way["offload"] == "group":
        return True
    ran = outcomes(way["bytes"], way["runs"])
    least = next((c for c in cards_by_count(way["bytes"]) if ran.get(c, True)), None)
    return least is None or least in ran


def measure_grouped(video: Video, memory: Memory, device: str) -> dict[str, float]:
    """Return the peaks of steps whose layers come to the GPU when they are needed."""
    found: dict[str, float] = {}
    for name in ("diffusers", "SVG2"):
        bench = Bench(video, device)
        if device == "cuda":
            bench.pipe.to("cpu")
            place(bench.pipe, "cuda", "group")
        taken = measure_steps(bench, STEPS[name], memory, decode=False)
        sparse = STEPS[name].method is not None
        kept = measured_centroids(video, bench.pipe) if sparse else 0
        found[name] = taken["denoising"] - kept
        bench.close()
        memory.free()
    return found


def run_capped(
    video: Video,
    way: Way,
    card: int,
    size: float,
    peak: float | None,
    memory: Memory,
    device: str,
) -> dict[str, Any]:
    """Run a model of three layers, and a tensor for the rest, in the memory of a card.

    Args:
        video: of three layers.
        way: how it is held.
        card: GB.
        size: bytes that the whole model needs.
        peak: bytes that this one takes beside its weights; None to measure that first.
        memory: of the GPU.
        device: "cuda" or "cpu".

    Returns:
        Whether it ran on this card when so many bytes were taken at its highest, or why not.
    """
    part = STEPS[way.steps]
    bench = Bench(video, device)
    if way.weights == "fp8":
        store_in_fp8(bench.pipe)
    decode = way.offload == "none"
    if not decode:
        bench.pipe.vae.to("cpu")
    memory.free()
    if peak is None:
        taken = measure_steps(bench, part, memory, decode=decode)
        own = max(taken["denoising"], taken.get("decoding", 0) + taken["before"])
    else:
        own = memory.allocated() + peak
    memory.free()
    ran, why = True, ""
    memory.cap(CARDS[card] - CONTEXT)
    try:
        kept = memory.ballast(size - own)
        measure_steps(bench, part, memory, decode=decode)
        del kept
    except torch.OutOfMemoryError as error:
        ran, why = False, reason(error)
    finally:
        memory.cap(None)
        bench.close()
        memory.free()
    return {"card": card, "bytes": size, "ran": ran, "reason": why}


def clip_of(video: Video) -> str:
    """Return size and frames of a clip, for people."""
    given = video.arguments
    return f"{given['width']}x{given['height']}, {given['num_frames']} frames"


def gib(size: float) -> str:
    """Return bytes for people."""
    return f"{size / GIB:.1f} GiB"


def run(args: argparse.Namespace) -> None:
    """Measure and store."""
    budget = Budget(seconds=args.seconds)
    device = "cpu" if args.tiny else "cuda"
    if args.tiny:
        let_a_cpu_have_fp8()
    memory = Memory(device)
    result: dict[str, Any] = {"models": []}
    if args.output.exists():
        result = stored(args.output)
    if not args.tiny:
        result["environment"] = environment(args.commit)
    videos = TINY if args.tiny else VIDEOS
    asked = named("video", [video.name for video in videos], args.models)
    known = {one["name"]: one for one in result["models"]}
    for video in videos:
        if video.name not in asked or is_done(known.get(video.name)):
            continue
        expected = SECONDS + MORE_SECONDS * min(1.5, video.pass_s / 12.6) + video.decode_s
        try:
            if video.name not in known:
                if not budget.has(expected, video.name):
                    continue
                known[video.name] = begin(video, memory, device, budget) | {
                    "commit": result.get("environment", {}).get("commit"),
                    "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
                }
                result["models"].append(known[video.name])
                store(args.output, result)
            model = known[video.name]
            for way in WAYS:
                title = f"{video.name}, {way.name}"
                told = model["ways"].get(way.name)
                done = told is not None and is_settled(told)
                if done or not budget.has(expected / 2, title):
                    continue
                found = measure_way(video, way, model, memory, device)
                model["ways"][way.name] = found
                size, card = gib(found["bytes"]), found["card"]
                budget.say(f"{title}: {size}, fits {card} GB {found['runs']}")
                store(args.output, result)
        except (torch.OutOfMemoryError, *UNAVAILABLE) as error:
            budget.say(f"{video.name}: {reason(error)}")
    budget.say("done")


def is_whole(model: Mapping[str, Any]) -> bool:
    """Return whether all of a model is measured."""
    return len(model["ways"]) == len(WAYS)


def is_done(model: Mapping[str, Any] | None) -> bool:
    """Return whether nothing of a model is to be run, or to be run again."""
    return model is not None and is_whole(model) and all(map(is_settled, model["ways"].values()))


def count(path: Path) -> None:
    """Count the weights of what is stored anew, and which card it fits on.

    Raises:
        SystemExit: if nothing is stored.
    """
    result = stored(path)
    videos = {video.name: video for video in (*VIDEOS, *TINY)}
    for model in result["models"]:
        model["weights"] = describe(videos[model["name"]])
        found = model["activations"]
        for way in WAYS:
            told = model["ways"].get(way.name)
            if told is None:
                continue
            decoding = found["diffusers"]["decoding"]
            told["bytes"] = need(way, model["weights"], found, decoding, model["grouped"])
            told["card"] = card_of(told["bytes"], told["runs"])
            if not is_settled(told):
                print(f"{model['name']}, {way.name}: {gib(told['bytes'])}, to be run")
    store(path, result)


def cell_of(way: Mapping[str, Any] | None) -> str:
    """Return what a way needs and the card for it, and whether it was run there."""
    if way is None:
        return ""
    card, size = way["card"], way["bytes"]
    ran = outcomes(size, way["runs"])
    untried = not ran.get(card) if card is not None else cards_by_count(size) and not ran
    counted = way["offload"] != "group" and bool(untried)
    marks = " †" * counted + " ‡" * (False in ran.values())
    return f"{size / GIB:.1f}, {'none' if card is None else f'{card} GB'}{marks}"


def written(models: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the page, a line for each kind of steps of each model."""
    kept = list(dict.fromkeys((way.offload, way.weights) for way in WAYS))
    lines = []
    for model in models:
        for steps in dict.fromkeys(way.steps for way in WAYS):
            own = {
                (way["offload"], way["weights"]): way
                for way in model["ways"].values()
                if way["steps"] == steps
            }
            lines.append([model["name"], steps, *(cell_of(own.get(how)) for how in kept)])
    titles = [f"`{offload}`, {stored}" for offload, stored in kept]
    return table(["model", "steps", *titles], lines)


def compared(models: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of what a sparse step takes more than diffusers', and of the commits."""
    lines = []
    for model in models:
        taken = {name: model["activations"][name]["activations"] for name in ("diffusers", "SVG2")}
        more = taken["SVG2"] + model["weights"]["centroids"] - taken["diffusers"]
        lines.append([model["name"], f"{more / GIB:+.1f} GiB", model["commit"]])
    return table(["model", "a step of SVG2, beside one of diffusers", "commit"], lines)


def write_table(path: Path) -> None:
    """Fill the documentation and the table of the package.

    Raises:
        SystemExit: if nothing is stored.
    """
    page = PAGES[0].parent / "guide" / "low-memory.md"
    result = stored(path)
    whole = [model for model in result["models"] if is_whole(model)]
    models = sorted(whole, key=lambda model: model["name"])
    machine = conditions(result["environment"] | {"commit": "of each model as listed"})
    text = f"{written(models)}\n{compared(models)}\n{machine}"
    replace_between(page, "memory", text)
    keep = ("offload", "weights", "steps", "bytes", "card")
    needs = [
        {
            "checkpoints": model["checkpoints"],
            "clip": model["clip"],
            "ways": [{name: way[name] for name in keep} for way in model["ways"].values()],
        }
        for model in models
    ]
    store(TABLE, {"format": "svg-needs/1", "gpu": result["environment"]["gpu"], "models": needs})


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["run", "count", "table"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=[], help="words of the names to run")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--tiny", action="store_true", help="toys on the CPU, to try the code")
    parser.add_argument("--commit", help="recorded where there is no git")
    args = parser.parse_args(arguments)
    actions: dict[str, Callable[[], None]] = {
        "run": lambda: run(args),
        "count": lambda: count(args.output),
        "table": lambda: write_table(args.output),
    }
    actions[args.action]()


if __name__ == "__main__":
    main()
