"""Measure what fused blocks and fp8 products cost in decibels, beside what sparsity costs.

    export PYTHONPATH=packages/svg-models  # for the scenes of the training script
    python benchmarks/quality_precision.py run --output benchmarks/results/h100/precision.json
    python benchmarks/quality_precision.py table --output benchmarks/results/h100/precision.json

Each row is the embedded model with the same method, schedule, prompts and noise; only who computes
the rest of a block changes. PSNR against the dense clips of the pipeline as it is says what a
person would see; PSNR against the row without fusing, at the same method, what the change itself
does. The noise floor is a second dense kernel.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import quality
from _harness import ROOT, conditions, environment, replace_between, store, table

from svg_attention import SVG2, Dense
from svg_models import sparsify
from svg_models.embedded.defaults import FRAMES
from svg_models.generation.other_kernel import other_dense_kernel
from svg_models.loading import Geometry
from svg_models.recipes import cluster_counts

PAGE = ROOT / "docs" / "embedded-model.md"
DENSITY = 0.3
ROWS: dict[str, dict[str, Any]] = {
    "blocks as they are": {"fuse": False},
    "fused blocks": {},
    "fused, fp8 products in sparse steps": {"linears": "fp8"},
    "fused, fp8 products in all steps": {"linears": "fp8", "fp8_from": "start"},
}


def run(args: argparse.Namespace) -> None:
    """Measure and store."""
    pipe, prompts = quality.load(args)
    dense = quality.sample(pipe, prompts, args.side, args)
    with other_dense_kernel(pipe):
        again = quality.sample(pipe, prompts, args.side, args)
    floor = quality.summary(quality.closeness(again, dense)["psnr"])
    print(f"noise floor {quality.decibels(floor)}", flush=True)
    tokens = Geometry.of(pipe).tokens(height=args.side, width=args.side, frames=FRAMES)
    q_clusters, k_clusters = cluster_counts(tokens, 300, 1000)
    counts: dict[str, Any] = {"q_clusters": q_clusters, "k_clusters": k_clusters}
    sparse = SVG2(**counts, density=DENSITY, compensate=True, route="error")
    rows: list[dict[str, Any]] = []
    for name, method in (("dense", Dense()), ("SVG2", sparse)):
        plain = None
        for label, options in ROWS.items():
            if method == Dense() and options.get("linears") == "fp8" and "fp8_from" not in options:
                continue  # a dense run has no sparse step
            with sparsify(pipe, method, quality.SCHEDULE, **options):
                clips = quality.sample(pipe, prompts, args.side, args)
            plain = clips if plain is None else plain
            close = quality.closeness(clips, dense)
            itself = quality.closeness(clips, plain)
            rows.append(
                {
                    "method": name,
                    "rest": label,
                    "psnr": quality.summary(close["psnr"]),
                    "ssim": quality.summary(close["ssim"]),
                    "psnr_to_unfused": quality.summary(itself["psnr"]),
                }
            )
            print(rows[-1], flush=True)
            result = {
                "environment": environment(args.commit),
                "density": DENSITY,
                "prompts": len(prompts),
                "steps": args.steps,
                "side": args.side,
                "noise_floor": floor,
                "rows": rows,
            }
            store(args.output, result)


def write_table(path: Path) -> None:
    """Fill the table of the embedded model's page."""
    result = json.loads(path.read_text("utf-8"))
    head = ["attention", "the rest of a block", "PSNR to dense", "SSIM", "PSNR to unfused"]
    lines = [
        [
            row["method"],
            row["rest"],
            quality.decibels(row["psnr"]),
            "1" if row["ssim"]["mean"] is None else f"{row['ssim']['mean']:.4f}",
            quality.decibels(row["psnr_to_unfused"]),
        ]
        for row in result["rows"]
    ]
    text = (
        f"{conditions(result['environment'])} {result['prompts']} held-out prompts, "
        f"{result['steps']} steps, {FRAMES} frames of {result['side']} x {result['side']}; "
        f"SVG2 at {result['density']:.0%}, compensated and routed by error. "
        f"Noise floor (another dense kernel): {quality.decibels(result['noise_floor'])}.\n\n"
    )
    replace_between(PAGE, "precision", text + table(head, lines))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["run", "table"])
    quality.add_options(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", type=int, default=128)
    args = parser.parse_args()
    if args.action == "run":
        run(args)
    else:
        write_table(args.output)


if __name__ == "__main__":
    main()
