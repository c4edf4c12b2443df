"""Measure how close sparse clips of the embedded model are to dense ones, per method and density.

    export PYTHONPATH=packages/svg-models  # for the scenes of the training script
    python benchmarks/quality.py run --device cuda --output benchmarks/results/h100/quality.json
    python benchmarks/quality.py table benchmarks/results/h100/quality.json

Every method gets the same prompts, the same noise, the same schedule and the same budget of
query-key pairs on its sparse calls. The dense clips come twice, by two dense kernels: what one
differs from the other is the noise floor, and nothing can be asked to be closer than that.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _harness import ROOT, replace_between
from torch import Tensor
from training.clips import caption
from training.evaluate import held_out_scenes

from svg_attention import SVG1, SVG2, Method, RandomBlocks, Schedule
from svg_models import embedded_path, sparsify
from svg_models.embedded.defaults import FRAMES
from svg_models.loading import Geometry
from svg_models.recipes import cluster_counts
from svg_models.video import similarity

SIDES = {"default": 128, "large": 256}
DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
# Three denoising steps in ten stay dense, as in the published settings of SVG2.
SCHEDULE = Schedule(dense_steps=0.3, dense_layers=0.0)


def methods(tokens: int, density: float) -> dict[str, Method]:
    """Return every method that is compared, at one density."""
    q_clusters, k_clusters = cluster_counts(tokens, 300, 1000)
    counts: dict[str, Any] = {
        "q_clusters": q_clusters,
        "k_clusters": k_clusters,
        "density": density,
    }
    return {
        "SVG2": SVG2(**counts),
        "SVG2 + compensation": SVG2(**counts, compensate=True),
        "SVG2 + compensation, routed by error": SVG2(**counts, compensate=True, route="error"),
        "SVG1": SVG1(density=density),
        "random blocks": RandomBlocks(density=density),
    }


def sample(pipe: Any, prompts: Sequence[str], side: int, args: argparse.Namespace) -> Tensor:
    """Generate one clip per prompt from noise of its own: uint8 `[N, T, 3, H, W]` on the device."""
    generators = [torch.Generator("cpu").manual_seed(1000 + i) for i in range(len(prompts))]
    clips: Tensor = pipe(
        list(prompts),
        height=side,
        width=side,
        num_frames=FRAMES,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=generators,
        output_type="pt",
    ).frames
    return (clips.float().clamp(0, 1) * 255).round().to(torch.uint8)


def closeness(clips: Tensor, dense: Tensor) -> dict[str, list[float]]:
    """Return per clip the mean PSNR in dB and SSIM of its frames against the dense clip."""
    pairs = [
        similarity(clip, reference, device=clips.device)
        for clip, reference in zip(clips, dense, strict=True)
    ]
    return {
        "psnr": [pair.mean_psnr for pair in pairs],
        "ssim": [pair.mean_ssim for pair in pairs],
    }


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


def measure(
    pipe: Any, prompts: Sequence[str], side: int, dense: Tensor, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Run every method at every density and compare it with the dense clips."""
    tokens = Geometry.of(pipe).tokens(height=side, width=side, frames=FRAMES)
    for density in args.densities:
        for name, method in methods(tokens, density).items():
            started = time.perf_counter()
            with sparsify(pipe, method, SCHEDULE, backend=args.backend) as run:
                clips = sample(pipe, prompts, side, args)
                realised = run.stats().mean_density
            close = closeness(clips, dense)
            row = {
                "method": name,
                "config": method.to_dict(),
                "density": density,
                "realised_density": round(float(realised), 4),
                "psnr": summary(close["psnr"]),
                "ssim": summary(close["ssim"]),
                "per_clip": {name: plain(values) for name, values in close.items()},
                "seconds": round(time.perf_counter() - started, 2),
            }
            print(
                f"{side:4d} {density:.0%} {name:38s} density {realised:.3f} "
                f"PSNR {decibels(row['psnr'])} SSIM {row['ssim']['mean']:.4f} {row['seconds']} s",
                flush=True,
            )
            yield row


@contextmanager
def other_kernel(pipe: Any) -> Iterator[None]:
    """Make the transformer use another of torch's dense kernels than it would take by itself."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel = SDPBackend.EFFICIENT_ATTENTION if torch.cuda.is_available() else SDPBackend.MATH
    stock = pipe.transformer.forward

    def forward(*args: Any, **options: Any) -> Any:
        with sdpa_kernel(kernel):
            return stock(*args, **options)

    with mock.patch.object(pipe.transformer, "forward", forward):
        yield


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
        "commit": commit or args.commit,
    }


def load(args: argparse.Namespace) -> tuple[Any, list[str]]:
    """Load the model; return its pipeline and the held-out prompts."""
    from diffusers import WanPipeline

    dtype = getattr(torch, args.dtype)
    pipe = WanPipeline.from_pretrained(args.model or embedded_path(), torch_dtype=dtype)
    pipe = pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, [caption(scene) for scene in held_out_scenes(args.prompts)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every measurement of quality takes."""
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--backend", default="auto", help="see `svg doctor`")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--commit", default="", help="stored where there is no git")


def run(args: argparse.Namespace) -> None:
    """Measure and store."""
    pipe, prompts = load(args)
    results: dict[str, Any] = {
        "environment": environment(args),
        "steps": args.steps,
        "guidance": args.guidance,
        "prompts": prompts,
        "schedule": SCHEDULE.to_dict(),
        "sizes": {},
    }
    for size in args.sizes:
        side = SIDES[size]
        dense = sample(pipe, prompts, side, args)
        with other_kernel(pipe):
            again = sample(pipe, prompts, side, args)
        floor = closeness(again, dense)
        print(f"{side:4d} noise floor PSNR {decibels(summary(floor['psnr']))}", flush=True)
        rows: list[dict[str, Any]] = []
        results["sizes"][size] = {
            "side": side,
            "frames": FRAMES,
            "noise_floor": {name: summary(values) for name, values in floor.items()},
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        for row in measure(pipe, prompts, side, dense, args):
            rows.append(row)
            args.output.write_text(json.dumps(results, indent=1) + "\n")


def table(args: argparse.Namespace) -> None:
    """Write stored results into the documentation, as a table and a plot."""
    results = json.loads(args.results.read_text())
    env = results["environment"]
    lines = [
        f"{len(results['prompts'])} held-out prompts, {results['steps']} steps, guidance "
        f"{results['guidance']}, {env['dtype']} on {env['device']}, torch {env['torch']}, commit "
        f"{env['commit']}. Mean ± standard deviation over prompts, at equal density of the "
        "sparse calls; where a method missed it by a point or more, its own stands in brackets.",
        "",
    ]
    for size, part in results["sizes"].items():
        floor = part["noise_floor"]
        lines += [
            f"### {size.capitalize()} clip, {part['frames']} x {part['side']} x {part['side']}",
            "",
            "PSNR in dB against dense. Noise floor (another dense kernel): "
            f"PSNR {_spread(floor['psnr'], 1)}, SSIM {_spread(floor['ssim'], 3)}.",
            "",
        ]
        for metric, digits in (("psnr", 1), ("ssim", 3)):
            lines += [*_grid(part["rows"], metric, digits), ""]
    _plot(results, ROOT / "docs" / "assets" / "quality.png")
    replace_between(ROOT / "docs" / "embedded-model.md", "quality", "\n".join(lines))


def _spread(numbers: dict[str, float | None], digits: int) -> str:
    if numbers["mean"] is None:
        return "identical"
    return f"{numbers['mean']:.{digits}f} ± {numbers['std']:.{digits}f}"


def _grid(rows: list[dict[str, Any]], metric: str, digits: int) -> list[str]:
    names = list(dict.fromkeys(row["method"] for row in rows))
    densities = list(dict.fromkeys(row["density"] for row in rows))
    cells = {(row["method"], row["density"]): row for row in rows}
    head = f"| {metric.upper()} | " + " | ".join(f"{d:.0%}" for d in densities) + " |"
    out = [head, "|---|" + "---|" * len(densities)]
    for name in names:
        row = [
            _spread(cells[name, d][metric], digits) + _missed(d, cells[name, d]["realised_density"])
            for d in densities
        ]
        out.append(f"| {name} | " + " | ".join(row) + " |")
    return out


def _missed(wanted: float, realised: float) -> str:
    return f" ({realised:.0%})" if abs(wanted - realised) >= 0.01 else ""


def _plot(results: dict[str, Any], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = results["sizes"]
    figure, axes = plt.subplots(1, len(sizes), figsize=(5.2 * len(sizes), 4), sharey=True)
    for axis, (size, part) in zip([axes] if len(sizes) == 1 else axes, sizes.items(), strict=True):
        for name in dict.fromkeys(row["method"] for row in part["rows"]):
            rows = [row for row in part["rows"] if row["method"] == name]
            axis.plot(
                [100 * row["realised_density"] for row in rows],
                [row["psnr"]["mean"] for row in rows],  # None, where clips are identical, is a gap
                marker="o",
                label=name,
            )
        floor = part["noise_floor"]["psnr"]["mean"]
        if floor is not None:
            axis.axhline(floor, color="grey", ls=":", label="noise floor")
        axis.set(title=f"{size} clip", xlabel="density of sparse calls, %")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("PSNR against dense, dB")
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=8, ncols=3, loc="lower center")
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(target, dpi=130)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="measure and store")
    add_options(runner)
    runner.add_argument("--sizes", nargs="+", choices=list(SIDES), default=list(SIDES))
    runner.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    runner.set_defaults(call=run)
    tables = commands.add_parser("table", help="write the table and the plot")
    tables.add_argument("results", type=Path)
    tables.set_defaults(call=table)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
