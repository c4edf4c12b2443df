"""Time a forward pass of real transformers of diffusers, as they are and made sparse by `sparsify`.

    python benchmarks/bench_models.py run --output benchmarks/results/h100
    python benchmarks/bench_models.py run --output benchmarks/results/h100 --compile svg2 stock
    python benchmarks/bench_models.py table --gpu h100
    python benchmarks/bench_models.py run --tiny --output tiny    # toy models on a CPU

The models have the shapes of Wan 2.1 14B and HunyuanVideo, a few of their layers, and random
weights. Outputs are checked first: dense runs and runs at density 1 against the model in fp32.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _harness import (
    ROOT,
    conditions,
    environment,
    interleave,
    load,
    named,
    replace_between,
    store,
    summary,
    table,
)
from _model_subjects import SUBJECTS, TINY, Subject
from bench_wan_block import by_kind
from torch import Tensor

from svg_attention import SVG1, SVG2, Dense, Schedule
from svg_models import sparsify

EVERY_STEP = Schedule(dense_steps=0.0, dense_layers=0.0)
DENSITY, BAND_DENSITY = 0.25, 0.30
STOCK = "diffusers"
KINDS = ("attention", "matrix products", "the rest")
PAGE = ROOT / "docs" / "speed.md"


def ways(subject: Subject) -> dict[str, dict[str, Any] | None]:
    """Return what `sparsify` is given, by name of what is timed; None for the model as it is."""
    queries, keys = subject.clusters
    svg2 = SVG2(q_clusters=queries, k_clusters=keys, density=DENSITY)
    return {
        STOCK: None,
        "dense steps, attention alone": {"method": Dense(), "fuse": False, "exact_dense": True},
        "dense steps": {"method": Dense()},
        "SVG2, attention alone": {"method": svg2, "fuse": False},
        "SVG2": {"method": svg2},
        "SVG2, fp8 products": {"method": svg2, "linears": "fp8"},
        "SVG2, fp8": {"method": svg2, "linears": "fp8", "attention": "fp8"},
        "SVG1": {"method": SVG1(density=BAND_DENSITY)},
    }


def build(subject: Subject, device: str) -> Any:
    """Return the model with random weights, in the precisions diffusers loads it with."""
    import diffusers

    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(diffusers, subject.kind)(**subject.config)
    wide = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and not set(wide) & set(name.split(".")):
            tensor.data = tensor.data.bfloat16()
    return model.eval().requires_grad_(False)


def make_inputs(subject: Subject, grid: tuple[int, int, int], device: str) -> dict[str, Any]:
    """Return arguments of a forward pass over latents of `grid`."""
    with torch.device(device):
        tokens, width = subject.text
        inputs: dict[str, Any] = dict(
            hidden_states=torch.randn(1, subject.latents[0], *grid).bfloat16(),
            timestep=torch.tensor([500]),
            encoder_hidden_states=torch.randn(1, tokens, width).bfloat16(),
            return_dict=False,
        )
        if subject.pooled:
            inputs |= dict(
                encoder_attention_mask=torch.ones(1, tokens, dtype=torch.bfloat16),
                pooled_projections=torch.randn(1, subject.pooled).bfloat16(),
                guidance=torch.tensor([6000.0], dtype=torch.bfloat16),
            )
    return inputs


def forwards(model: Any, inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
    """Return a function that makes one denoising step after the other, always of the same clip."""
    steps = itertools.count()

    def forward() -> Tensor:
        moment = dict(step_index=next(steps), num_inference_steps=1000)
        with torch.no_grad(), model.cache_context("cond", **moment):
            return model(**inputs)[0]

    return forward


@contextmanager
def running(model: Any, way: Mapping[str, Any] | None) -> Iterator[Any]:
    """Make the model sparse for a while, unless it is timed as it is."""
    if way is None:
        yield None
    else:
        with sparsify(model, schedule=EVERY_STEP, **way) as run:
            yield run


def check(subject: Subject, model: Any, device: str) -> dict[str, float]:
    """Return errors against the same weights in fp32; raise if ours is twice that of diffusers."""
    inputs = make_inputs(subject, subject.small, device)
    found = {}
    everything = SVG2(q_clusters=4, k_clusters=12, density=1.0)
    ways: dict[str, Any] = {STOCK: None, "dense steps": {"method": Dense()}}
    for name, way in (ways | {"density 1": {"method": everything}}).items():
        with running(model, way):
            found[name] = forwards(model, inputs)()
    wide = copy.deepcopy(model).float()
    floats = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = forwards(wide, floats)().double()
    error = {
        name: ((out.double() - exact).norm() / exact.norm()).item() for name, out in found.items()
    }
    if not all(one <= 2 * error[STOCK] for one in error.values()):
        raise RuntimeError(f"{subject.name}: a dense run is not what diffusers computes: {error}")
    return error


def clock(forward: Callable[[], Tensor], samples: int, device: str) -> list[float]:
    """Return milliseconds of forward passes, by the device's clock where it has one."""
    if device == "cuda":
        return interleave({"forward": forward}, samples=samples, warmup=0)["forward"]
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        forward()
        times.append(1e3 * (time.perf_counter() - start))
    return times


class Measurement:
    """The numbers of one subject, and the model while they are taken."""

    def __init__(
        self, subject: Subject, device: str, *, profile: bool, say: Callable[[str], None]
    ) -> None:
        self.subject, self.device, self.profile, self.say = subject, device, profile, say
        self.model = build(subject, device)
        self.error = check(subject, self.model, device)
        say(f"{subject.name}: errors against fp32 {self.error}")
        self.inputs = make_inputs(subject, subject.latents[1:], device)
        self.times: dict[str, list[float]] = {}
        self.density: dict[str, float] = {}
        self.memory: dict[str, float] = {}
        self.kinds: dict[str, dict[str, float]] = {}

    def take(self, name: str, way: Mapping[str, Any] | None, *, samples: int, warmup: int) -> None:
        """Time forward passes in one way, after `warmup` of them."""
        forward = forwards(self.model, self.inputs)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with running(self.model, way) as run:
            for _ in range(warmup):
                out = forward()
            if not torch.isfinite(out).all():
                raise RuntimeError(f"{self.subject.name}, {name}: the output is not finite")
            del out
            warm = time.perf_counter() - start
            times = clock(forward, samples, self.device)
            if self.profile and name not in self.kinds:
                self.kinds[name] = by_kind(forward)
            if run is not None:
                self.density[name] = run.stats().mean_density_with_dense_calls
        if self.device == "cuda":
            self.memory[name] = torch.cuda.max_memory_allocated() / 1e9
        self.times.setdefault(name, []).extend(times)
        layer = [round(t / self.subject.layers, 1) for t in times]
        self.say(f"{self.subject.name}: {name} {layer} ms a layer, warm after {warm:.1f} s")

    def result(self) -> dict[str, Any]:
        """Return what was found so far, as plain data."""
        return {
            "name": self.subject.name,
            "tokens": self.subject.tokens,
            "text_tokens": self.subject.text[0] if self.subject.pooled else 0,
            "layers": self.subject.layers,
            "clusters": self.subject.clusters,
            "aim": self.subject.aim,
            "error_vs_fp32": self.error,
            "ms_per_forward": {name: summary(times) for name, times in self.times.items()},
            "samples": {name: len(times) for name, times in self.times.items()},
            "density": self.density,
            "peak_gb": self.memory,
            "ms_by_kind": self.kinds,
        }


def measure(
    subject: Subject,
    device: str,
    *,
    samples: int,
    rounds: int,
    compiled: Sequence[str],
    profile: bool,
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Time all methods in turns, then the compiled ones; save after each."""
    taken = Measurement(subject, device, profile=profile, say=say)
    chosen = ways(subject)
    if device != "cuda":
        chosen = {name: way for name, way in chosen.items() if "fp8" not in name}
    for _ in range(rounds):
        for name, way in chosen.items():
            # The first sparse step makes its clusters from nothing; it is not what is timed.
            warmup = 2 if name.startswith("SVG") else 1
            taken.take(name, way, samples=samples, warmup=warmup)
            save(taken.result())
    if compiled:
        compiler = "inductor" if device == "cuda" else "aot_eager"
        taken.model.compile_repeated_blocks(fullgraph=True, backend=compiler)
    names = {"svg2": "SVG2", "stock": STOCK}
    for word in compiled:
        name = names[word]
        taken.take(f"{name}, compiled", chosen[name], samples=samples, warmup=3)
        save(taken.result())


def run(args: argparse.Namespace) -> None:
    device = "cpu" if args.tiny else "cuda"
    began = time.perf_counter()
    result: dict[str, Any] = {} if args.tiny else {"environment": environment(args.commit)}
    result |= {"density": DENSITY, "band_density": BAND_DENSITY, "models": []}

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {text}", flush=True)

    def save(row: dict[str, Any]) -> None:
        result["models"] = [r for r in result["models"] if r["name"] != row["name"]] + [row]
        store(args.output / "models.json", result)

    subjects = TINY if args.tiny else SUBJECTS
    asked = named("model", [subject.name for subject in subjects], args.models)
    for subject in subjects:
        if subject.name not in asked:
            continue
        measure(
            subject,
            device,
            samples=args.samples,
            rounds=args.rounds,
            compiled=args.compile,
            profile=args.profile,
            say=say,
            save=save,
        )
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    say("done")


def rows_of(model: Mapping[str, Any]) -> list[list[str]]:
    """Return the lines of one model, in the order they were first timed."""
    lines = []
    stock = model["ms_per_forward"][STOCK]["median"]
    for name, ms in model["ms_per_forward"].items():
        layer = {part: value / model["layers"] for part, value in ms.items()}
        sparse = name.startswith("SVG")
        lines.append(
            [
                model["name"],
                name,
                f"{layer['median']:.1f} ({layer['q1']:.1f} to {layer['q3']:.1f})",
                f"{stock / ms['median']:.2f}",
                f"{model['aim']:.1f}" if sparse else "",
                f"{model['density'][name]:.1%}" if sparse else "",
                f"{model['peak_gb'][name]:.0f}" if name in model["peak_gb"] else "",
            ]
        )
    return lines


def kinds_of(model: Mapping[str, Any]) -> list[list[str]]:
    """Return where the time of a layer goes, for what was profiled."""
    return [
        [model["name"], name, *(f"{kinds[kind] / model['layers']:.1f}" for kind in KINDS)]
        for name, kinds in model["ms_by_kind"].items()
    ]


def written(result: Mapping[str, Any]) -> str:
    """Return the table and what was checked."""
    head = [
        *("model", "attention", "ms a layer (quartiles)", "times faster", "aim"),
        *("density", "peak GB"),
    ]
    text = table(head, [line for model in result["models"] for line in rows_of(model)])
    kinds = [line for model in result["models"] for line in kinds_of(model)]
    if kinds:
        text += (
            "\nWhere the time of a layer goes, by the names of the kernels in a profile, ms:\n\n"
        )
        text += table(["model", "attention", *KINDS], kinds)
    for model in result["models"]:
        tokens = f"{model['tokens']:,} video tokens"
        if model["text_tokens"]:
            tokens += f" and {model['text_tokens']} of text"
        errors = ", ".join(f"{name} {e:.2e}" for name, e in model["error_vs_fp32"].items())
        text += (
            f"\n{model['name']}: {tokens}, {model['layers']} layers, "
            f"{model['clusters'][0]} and {model['clusters'][1]} clusters of queries and keys. "
            f"Relative error in bf16 against fp32, on a small clip: {errors}.\n"
        )
    return text


def write_table(gpu: str) -> None:
    result = load(gpu, "models")
    text = f"{conditions(result['environment'])}\n\n{written(result)}"
    replace_between(PAGE, "models", text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "h100")
    parser.add_argument("--gpu", default="h100", help="folder of the stored result")
    parser.add_argument("--models", nargs="*", default=[], help="words in the names of the models")
    parser.add_argument("--samples", type=int, default=2, help="forward passes a round, 2 or more")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", nargs="*", default=[], choices=["svg2", "stock"])
    parser.add_argument("--profile", action="store_true", help="also sort the time by kernel")
    parser.add_argument(
        "--tiny", action="store_true", help="toy models on the CPU, to try the code"
    )
    parser.add_argument("--commit", help="recorded where there is no git")
    args = parser.parse_args(arguments)
    if args.action == "run":
        run(args)
    else:
        write_table(args.gpu)


if __name__ == "__main__":
    main()
