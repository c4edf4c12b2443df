"""Measure how close sparse clips of a judge come to dense ones, and what a call costs.

    export PYTHONPATH=packages/svg-models  # for the scenes of the training script
    python benchmarks/quality.py run --seconds 240 --output benchmarks/results/h100/quality.json
    python benchmarks/quality.py table benchmarks/results/h100/quality.json

The judge is the embedded model, or with `--model` the folder that `training.train_footage export`
wrote, or `training.distill export`: its clips have the sizes, the guidance and the prompts that its
card names. Where the card names the steps, too, clips of so many are measured, and no others.

`run` measures as much as it has seconds for, the most telling first, and stores after each case.
Run again, it goes on where the file ends. On an H100 the first 240 s should hold every correction
for 16 prompts, and a quarter of an hour in all every method at every density. A case that fails is
stored with its reason, and the next begins.

Several GPUs share the cases: each runs a lane of its own, and `join` makes one file of theirs.

    CUDA_VISIBLE_DEVICES=0 python benchmarks/quality.py run --lane 0/2 --output lane-0.json &
    CUDA_VISIBLE_DEVICES=1 python benchmarks/quality.py run --lane 1/2 --output lane-1.json
    python benchmarks/quality.py join lane-0.json lane-1.json --output quality.json

Every method gets the same prompts and the same noise. The prompts are none of those that a setting
was chosen on. The dense clips come twice, by two dense kernels: what one differs from the other is
the noise floor, and nothing can be asked to be closer than that. Blocks are not fused, so that
attention alone differs. Beside the closeness stands what the attention of a step would take at Wan
720p, where a call is timed as a whole; it is the mean of all calls, dense ones included.
"""

from __future__ import annotations

import argparse
import math
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _quality_tables
import torch
from _harness import store, stored
from _judges import Judge, find_judge
from _quality_cases import SCHEDULE, Case, build, cases
from _quality_times import Times
from torch import Tensor

from svg_attention import TokenLayout
from svg_models import embedded_path, sparsify
from svg_models.generation.other_kernel import other_dense_kernel
from svg_models.loading import Geometry

__all__ = ["SCHEDULE", "add_options", "closeness", "decibels", "environment", "load"]
__all__ += ["sample", "summary"]

STARTED = time.monotonic()
# Settings were chosen on held-out prompts before these.
FIRST_PROMPT = 32
# Seconds that 16 clips take on an H100, a step, and that comparing them takes; for a start.
STEP_SECONDS = {"tiny": 0.1, "default": 0.15, "large": 0.8, "footage": 0.8}


def sample(
    pipe: Any,
    prompts: Sequence[str],
    size: tuple[int, int],
    args: argparse.Namespace,
    *,
    steps: int | None = None,
    first: int = 0,
) -> Tensor:
    """Generate one clip per prompt from noise of its own: uint8 `[N, T, 3, H, W]` on the device.

    Where the device has no memory for all at once, it takes half as many, and so on.

    Args:
        pipe: the pipeline.
        prompts: what to show.
        size: height and width in pixels.
        args: guidance and frames, and steps if they are not given.
        steps: denoising steps.
        first: number of the first prompt, which its noise follows from.
    """
    generators = [torch.Generator("cpu").manual_seed(1000 + first + i) for i in range(len(prompts))]
    try:
        clips: Tensor = pipe(
            list(prompts),
            height=size[0],
            width=size[1],
            num_frames=args.frames,
            num_inference_steps=steps or args.steps,
            guidance_scale=args.guidance,
            generator=generators,
            output_type="pt",
        ).frames
    except torch.cuda.OutOfMemoryError:
        if len(prompts) == 1:
            raise
    else:
        return (clips.float().clamp(0, 1) * 255).round().to(torch.uint8)
    torch.cuda.empty_cache()
    half = len(prompts) // 2
    parts = ((prompts[:half], first), (prompts[half:], first + half))
    return torch.cat([sample(pipe, p, size, args, steps=steps, first=n) for p, n in parts])


def closeness(clips: Tensor, dense: Tensor) -> dict[str, list[float]]:
    """Return per clip how close its frames are to the dense clip's: PSNR in dB, SSIM, flicker.

    They are those of `svg_models.video.similarity`, means over frames, computed for a clip at once.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    precision = torch.float64 if clips.is_cuda else torch.float32
    found: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "flicker": []}
    for clip, reference in zip(clips, dense, strict=True):
        a, b = (x.to(precision) / 255 for x in (clip, reference))
        psnr = -10 * (a.double() - b.double()).square().flatten(1).mean(dim=1).log10()
        finite = psnr.isfinite()
        mean = torch.where(finite, psnr, 0.0).sum() / finite.sum()
        found["psnr"].append(torch.where(finite.any(), mean, torch.inf))
        ssim = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
        found["ssim"].append(torch.atleast_1d(ssim).mean())
        found["flicker"].append(((a - b).diff(dim=0) * 255).abs().mean())
    return {name: torch.stack(values).tolist() for name, values in found.items()}


def summary(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, standard deviation, least and largest; None for all if nothing is finite.

    A clip that is identical to the dense one has no finite PSNR and is left out.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return dict.fromkeys(("mean", "std", "min", "max"))
    x = torch.tensor(finite, dtype=torch.float64)
    numbers = {
        "mean": x.mean(),
        "std": x.std(correction=min(1, len(finite) - 1)),
        "min": x.min(),
        "max": x.max(),
    }
    return {name: round(value.item(), 4) for name, value in numbers.items()}


def plain(values: Sequence[float]) -> list[float | None]:
    """Return values that JSON can hold: None stands for a clip without a finite PSNR."""
    return [round(value, 4) if math.isfinite(value) else None for value in values]


def decibels(psnr: dict[str, float | None]) -> str:
    """Return the mean of a summary of PSNR for people."""
    return "identical" if psnr["mean"] is None else f"{psnr['mean']:.2f} dB"


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Describe the machine and the versions."""
    import diffusers

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    cuda = args.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "dtype": args.dtype,
        "backend": args.backend,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": args.commit or commit,
    }


def load(args: argparse.Namespace, first: int = 0) -> tuple[Any, Judge]:
    """Load the model; return its pipeline and what it is asked for, prompts from `first` on.

    Guidance and frames that the command line leaves open become the judge's.

    Raises:
        SystemExit: if the folder holds no pipeline.
    """
    from diffusers import WanPipeline

    if args.model is not None and not (args.model / "model_index.json").exists():
        raise SystemExit(
            f"{args.model} holds no pipeline; give a folder that `training.train_footage export` "
            "wrote"
        )
    judge = find_judge(args.model, first=first, prompts=args.prompts)
    for name in ("guidance", "frames"):
        if getattr(args, name, None) is None:
            setattr(args, name, getattr(judge, name))
    dtype = getattr(torch, args.dtype)
    pipe = WanPipeline.from_pretrained(args.model or embedded_path(), torch_dtype=dtype)
    pipe = pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, judge


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every measurement of quality takes."""
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--backend", default="auto", help="see `svg doctor`")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--guidance", type=float, help="the judge's own if not given")
    parser.add_argument("--commit", default="", help="stored where there is no git")


class Measurement:
    """Measure cases one by one and store each in a file at once.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.times = Times(args.device)
        self._dense: dict[tuple[str, int], Tensor] = {}
        self._seconds: dict[tuple[str, int], float] = {}
        self.pipe, self.judge = load(args, FIRST_PROMPT)
        header = {
            "environment": environment(args),
            "judge": self.judge.name,
            "guidance": args.guidance,
            "frames": args.frames,
            "clips": {name: self._clip(name) for name in self.judge.sizes},
            "prompts": list(self.judge.prompts),
        }
        if self.judge.steps is not None:
            header["steps"] = self.judge.steps
        self.commit = header["environment"]["commit"]
        self.results: dict[str, Any] = {
            **header, "noise_floor": {}, "cases": {}, "times": {}, "failures": {},
        }  # fmt: skip
        if args.output.exists():
            found = stored(args.output)
            # Rows added to a file name the commit that measured them.
            known = {"judge": "embedded", "clips": header["clips"], **found}
            known["environment"] = {**found.get("environment", {}), "commit": self.commit}
            differs = [name for name in header if known.get(name) != header[name]]
            if differs:
                raise SystemExit(
                    f"{args.output} was measured with other {', '.join(differs)}; name another "
                    "--output, or remove it"
                )
            self.results = {"clips": header["clips"], **found, "failures": {}}

    def run(self, sizes: Sequence[str] | None) -> None:
        """Measure what is not stored yet, until the seconds are over.

        Raises:
            SystemExit: if the judge has no such size, or nothing has a chosen word in its name.
        """
        left = 0
        for size in sizes or ():
            if size not in self.judge.sizes:
                known = ", ".join(self.judge.sizes)
                raise SystemExit(f"--sizes of {self.judge.name} are {known}, not {size}")
        asked = {
            case.key if isinstance(case, Case) else f"{case[0]}: {case[1]:g}": case
            for case in cases(tuple(sizes or self.judge.measured), steps=self.judge.steps)
        }
        words = self.args.cases
        asked = {key: case for key, case in asked.items() if any(word in key for word in words)}
        if not asked:
            raise SystemExit(f"no case has {' or '.join(words)} in its name")
        lane, lanes = self.args.lane
        for key, case in list(asked.items())[lane::lanes]:
            if self.args.only == ("times" if isinstance(case, Case) else "clips"):
                continue
            stored = self.results["cases" if isinstance(case, Case) else "times"]
            if key in stored:
                continue
            passed = time.monotonic() - STARTED
            if passed + self._expected(case) > self.args.seconds:
                left += 1
                continue
            work: Callable[[Any], dict[str, Any]] = (
                self._measure_case if isinstance(case, Case) else self._time
            )
            try:
                stored[key] = work(case)
                if self.commit != self.results["environment"]["commit"]:
                    stored[key]["commit"] = self.commit
            except Exception as error:  # noqa: BLE001 -- one case must not cost the others
                traceback.print_exception(error)
                self.results["failures"][key] = f"{type(error).__name__}: {error}"[:300]
                if self.args.device.startswith("cuda"):
                    torch.cuda.empty_cache()
            self._store()
        failed = len(self.results["failures"])
        print(f"{time.monotonic() - STARTED:.0f} s; {left} left for another run, {failed} failed")

    def _store(self) -> None:
        target = self.args.output
        fresh = target.with_suffix(".part")
        store(fresh, self.results)
        fresh.replace(target)

    def _expected(self, case: Case | tuple[str, float]) -> float:
        """Return the seconds that a case will take, by those before it."""
        if not isinstance(case, Case):
            return 5.0
        clip = (case.size, case.steps)
        scale = self.args.prompts / 16
        fallback = (STEP_SECONDS[case.size] * case.steps + 0.5) * scale
        seconds = self._seconds.get(clip, fallback)
        # The dense clips come first, twice.
        return seconds * (1.0 if clip in self._dense else 3.0)

    def _clip(self, size: str) -> dict[str, int]:
        """Return what is stored of a size: pixels and video tokens."""
        height, width = self.judge.sizes[size]
        tokens = Geometry.of(self.pipe).tokens(
            height=height, width=width, frames=self.args.frames
        )  # fmt: skip
        return {"height": height, "width": width, "tokens": tokens}

    def _layout(self, size: str) -> TokenLayout:
        return TokenLayout(grid=(1, 1, self._clip(size)["tokens"]))

    def _sample(self, size: str, steps: int) -> Tensor:
        return sample(
            self.pipe, self.judge.prompts, self.judge.sizes[size], self.args, steps=steps,
            first=FIRST_PROMPT,
        )  # fmt: skip

    def _dense_clips(self, size: str, steps: int) -> Tensor:
        """Return the dense clips, and store the noise floor when they are made first."""
        if (size, steps) not in self._dense:
            clips = self._dense[size, steps] = self._sample(size, steps)
            name = f"{size} clip, {steps} steps"
            if name not in self.results["noise_floor"]:
                with other_dense_kernel(self.pipe):
                    again = self._sample(size, steps)
                floor = {m: summary(v) for m, v in closeness(again, clips).items()}
                self.results["noise_floor"][name] = floor
                print(f"{name}: noise floor {decibels(floor['psnr'])}", flush=True)
        return self._dense[size, steps]

    def _measure_case(self, case: Case) -> dict[str, Any]:
        """Run a method and compare its clips with the dense ones."""
        dense = self._dense_clips(case.size, case.steps)
        layout = self._layout(case.size)
        branches = 2 if self.args.guidance > 1 else 1
        density = case.sparse_density(layout, branches=branches)
        method = build(case.method, density, layout.tokens)
        started = time.perf_counter()
        with sparsify(
            self.pipe, method, case.schedule_at(density), backend=self.args.backend, fuse=False
        ) as run:
            clips = self._sample(case.size, case.steps)
            stats = run.stats()
        close = closeness(clips, dense)
        row: dict[str, Any] = {
            "size": case.size,
            "steps": case.steps,
            "schedule": case.schedule,
            "group": case.group,
            "method": case.method,
            "density": case.density,
            "dense_share": round(case.dense_share, 4),
            "realised_density": round(stats.mean_density, 4),
            "total_density": round(
                stats.mean_density_with_dense_calls + stats.mean_probe_density, 4
            ),
            **{name: summary(values) for name, values in close.items()},
            "per_clip": {name: plain(values) for name, values in close.items()},
            "config": method.to_dict(),
            "seconds": round(time.perf_counter() - started, 2),
        }
        self._seconds[case.size, case.steps] = max(
            row["seconds"], self._seconds.get((case.size, case.steps), 0.0)
        )
        print(
            f"{time.monotonic() - STARTED:4.0f} s  {case.key}: {decibels(row['psnr'])}, SSIM "
            f"{row['ssim']['mean']:.4f}, total {row['total_density']:.1%}, {row['seconds']} s",
            flush=True,
        )
        return row

    def _time(self, case: tuple[str, float]) -> dict[str, Any]:
        """Time a call of a method, and before the first one a dense call."""
        if "dense" not in self.results["times"]:
            self.results["times"]["dense"] = self.times.dense()
        found = self.times.call(*case)
        print(
            f"{time.monotonic() - STARTED:4.0f} s  a call at Wan 720p, {case[0]}, "
            f"{found['realised_density']:.1%}: {found['median']:.1f} ms",
            flush=True,
        )
        return found


def lane(text: str) -> tuple[int, int]:
    """Return number and count of `0/2`, the first of two lanes.

    Raises:
        ArgumentTypeError: if it is no such pair, or the number is not below the count.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"lanes of two are 0/2 and 1/2, got {text}")
    return int(number), int(count)


def join(parts: Sequence[Path], output: Path, times: Path | None = None) -> None:
    """Write one file of what lanes measured, their rows in the order of the cases.

    Args:
        parts: what the lanes stored.
        output: the file.
        times: stored results of another judge, whose times of calls at Wan 720p are these methods'
            too.

    Raises:
        SystemExit: if the lanes were measured with other prompts or on another machine, or a file
            is none of a lane.
    """
    found = [stored(path) for path in parts]
    same = ("environment", "judge", "guidance", "frames", "clips", "prompts")
    kinds = ("noise_floor", "cases", "times", "failures")
    for path, one in zip(parts, found, strict=True):
        lacks = [name for name in (*same, *kinds) if name not in one]
        if lacks:
            raise SystemExit(f"{path} is no lane of `quality.py run`: it has no {lacks[0]}")
        differs = [name for name in same if one[name] != found[0][name]]
        if differs:
            raise SystemExit(f"{path} was measured with other {', '.join(differs)}")
    tables: dict[str, dict[str, Any]] = {
        name: {key: row for one in found for key, row in one[name].items()} for name in kinds
    }
    if times is not None:
        other = stored(times)
        known = {name: other["environment"][name] for name in ("device", "commit")}
        tables["times"] = {key: {**known, **row} for key, row in other["times"].items()}
    sizes = tuple(dict.fromkeys(row["size"] for row in tables["cases"].values()))
    asked = cases(sizes, steps=found[0].get("steps")) if sizes else ()
    order = [case.key for case in asked if isinstance(case, Case)]
    place = {key: index for index, key in reversed(list(enumerate(order)))}
    rows = sorted(tables["cases"].items(), key=lambda item: place.get(item[0], len(order)))
    store(output, {**found[0], **tables, "cases": dict(rows)})
    print(f"{len(rows)} cases in {output}")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="measure and store")
    add_options(runner)
    runner.add_argument("--seconds", type=float, default=240.0, help="time to stop after")
    runner.add_argument(
        "--only", choices=["clips", "times"], help="clips on a machine that is too busy for times"
    )
    runner.add_argument("--sizes", nargs="+", help="of clips, by name: all that matter if none")
    runner.add_argument("--frames", type=int, help="the judge's own if not given")
    runner.add_argument(
        "--cases", nargs="+", default=[""], help="only with such a word in their name"
    )
    runner.add_argument("--lane", type=lane, default=(0, 1), help="0/2 is the first of two")
    runner.set_defaults(call=lambda args: Measurement(args).run(args.sizes))
    joiner = commands.add_parser("join", help="make one file of the lanes of several GPUs")
    joiner.add_argument("parts", nargs="+", type=Path)
    joiner.add_argument("--output", type=Path, required=True)
    joiner.add_argument("--times", type=Path, help="results of another judge to take times from")
    joiner.set_defaults(call=lambda args: join(args.parts, args.output, args.times))
    tables = commands.add_parser("table", help="write the tables and the plots")
    tables.add_argument("results", type=Path)
    tables.set_defaults(call=lambda args: _quality_tables.write(args.results))
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
