"""Measure what fused blocks, fp8 products and fp8 attention cost in decibels.

    export PYTHONPATH=packages/svg-models  # for the scenes of the training script
    python benchmarks/quality_precision.py run --output benchmarks/results/h100/precision.json
    python benchmarks/quality_precision.py table --output benchmarks/results/h100/precision.json

Each row is a judge, the embedded model or the one that `--model` names, with the same method,
schedule, prompts and noise; only the precision changes. PSNR against the dense clips of the
pipeline as it is says what a person would see, and what a row loses is that PSNR beside the one of
fused blocks in bf16, clip by clip; PSNR against the row without fusing, at the same method, is what
the change itself does. The noise floor is a second dense kernel. Heads of the embedded model have
64 channels, which the kernel in fp8 pads to 128. Rows "rounded once" and "to the last step" are
without what fp8 products do against their errors, so that each of it has its worth beside it.

Eight prompts take less than two minutes on an H100. On a CPU the reference rounds keys and values.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import quality
from _harness import (
    PLUS_MINUS,
    ROOT,
    conditions,
    environment,
    named,
    replace_between,
    store,
    stored,
    table,
)

from svg_attention import SVG2, Dense
from svg_models import sparsify
from svg_models.generation.other_kernel import other_dense_kernel
from svg_models.loading import Geometry
from svg_models.recipes import cluster_counts

DOCS = ROOT / "docs"
# Judge -> page with the marker `precision`.
PAGES = {"embedded": DOCS / "embedded-model.md", "footage": DOCS / "footage-model.md"}
DENSITY = 0.3
FUSED = "fused blocks"
BASES = ("blocks as they are", FUSED)  # what other rows are held against, measured every time
PRODUCTS: dict[str, Any] = {"linears": "fp8"}
ATTENTION: dict[str, Any] = {"attention": "fp8"}
START: dict[str, Any] = {"fp8_from": "start"}
ROWS: dict[str, dict[str, Any]] = {
    BASES[0]: {"fuse": False},
    FUSED: {},
    "fp8 products in sparse steps": PRODUCTS,
    "the same, weights rounded once": PRODUCTS,
    "the same, to the last step": PRODUCTS,
    "the same, weights rounded once, to the last step": PRODUCTS,
    "fp8 products in all steps": PRODUCTS | START,
    "fp8 attention in sparse steps": ATTENTION,
    "fp8 attention in all steps": ATTENTION | START,
    "both in sparse steps": PRODUCTS | ATTENTION,
    "both in all steps": PRODUCTS | ATTENTION | START,
}


def run(args: argparse.Namespace) -> None:
    """Measure and store."""
    asked = {*BASES, *named("row", list(ROWS), args.rows)}
    began = time.perf_counter()
    warnings.simplefilter("ignore", UserWarning)  # that padded heads gain no time
    cpu = args.device == "cpu"
    if cpu:
        let_a_cpu_have_fp8_products()
    pipe, judge = quality.load(args)
    prompts = judge.prompts
    size = (args.side, args.side) if args.side else judge.sizes[judge.measured[0]]
    dense = quality.sample(pipe, prompts, size, args)
    with other_dense_kernel(pipe):
        again = quality.sample(pipe, prompts, size, args)
    floor = quality.summary(quality.closeness(again, dense)["psnr"])
    print(f"noise floor {quality.decibels(floor)}", flush=True)
    tokens = Geometry.of(pipe).tokens(height=size[0], width=size[1], frames=args.frames)
    q_clusters, k_clusters = cluster_counts(tokens, 300, 1000)
    counts: dict[str, Any] = {"q_clusters": q_clusters, "k_clusters": k_clusters}
    sparse = SVG2(**counts, density=DENSITY, compensate=True, route="error")
    result: dict[str, Any] = {
        "environment": quality.environment(args) if cpu else environment(args.commit),
        "density": DENSITY,
        "prompts": len(prompts),
        "steps": args.steps,
        "judge": judge.name,
        "frames": args.frames,
        "height": size[0],
        "width": size[1],
        "noise_floor": floor,
        "rows": [],
    }
    known = known_rows(args, result)
    for name, method in (("dense", Dense()), ("SVG2", sparse)):
        plain = fused = None
        for label, options in ROWS.items():
            if label not in asked:
                continue
            rounded = "linears" in options or "attention" in options
            if method == Dense() and rounded and "fp8_from" not in options:
                continue  # a dense run has no sparse step
            given = options | ({"backend": "reference"} if cpu and "attention" in options else {})
            with without(label), sparsify(pipe, method, quality.SCHEDULE, **given) as run:
                clips = quality.sample(pipe, prompts, size, args)
            plain = clips if plain is None else plain
            close = quality.closeness(clips, dense)
            itself = quality.closeness(clips, plain)
            fused = close["psnr"] if label == FUSED else fused
            lost = [b - a for a, b in zip(close["psnr"], fused or [], strict=False)]
            stats = run.stats()
            result["rows"].append(
                {
                    "method": name,
                    "precision": label,
                    "fp8_calls": stats.fp8_calls,
                    "calls": stats.calls,
                    "psnr": quality.summary(close["psnr"]),
                    "ssim": quality.summary(close["ssim"]),
                    "lost": quality.summary(lost) if rounded and method != Dense() else None,
                    "psnr_to_unfused": quality.summary(itself["psnr"]),
                    "psnrs": close["psnr"],
                }
            )
            took = time.perf_counter() - began
            print(f"{took:6.1f} s  {name}, {label}: {quality.decibels(result['rows'][-1]['psnr'])}")
            store(args.output, joined(result, known))


def known_rows(args: argparse.Namespace, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows that are stored and not measured now, each with the commit that measured it.

    Raises:
        SystemExit: if they were measured under other conditions.
    """
    if not args.rows or not args.output.exists():
        return []
    found = stored(args.output)
    same = [name for name in result if name not in ("environment", "rows", "noise_floor")]
    differs = [name for name in same if found.get(name) != result[name]]
    if differs:
        raise SystemExit(
            f"{args.output} was measured with other {', '.join(differs)}; name another --output"
        )
    commit = found["environment"]["commit"]
    return [{"commit": commit, **row} for row in found["rows"]]


def joined(result: dict[str, Any], known: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a result with known rows in the place of those that were not measured, in order.

    What the others were held against stays as it was then.
    """
    if not known:
        return result
    places = {(row["method"], row["precision"]): row for row in known}
    for row in result["rows"]:
        if row["precision"] not in BASES:
            places[row["method"], row["precision"]] = row
    order = [(method, label) for method in ("dense", "SVG2") for label in ROWS]
    return result | {"rows": [places[place] for place in order if place in places]}


@contextmanager
def without(label: str) -> Iterator[None]:
    """Compute a row without what its label says that it is without."""
    from svg_models.recipe import Layers
    from svg_models.sparse import linears

    with ExitStack() as changes:
        if "rounded once" in label:
            once = mock.patch.object(linears, "largest_at", return_value=linears.LARGEST_E4M3)
            changes.enter_context(once)
        if "to the last step" in label:
            whole = mock.patch.object(Layers, "in_fp8", lambda self, *, sparse, **where: sparse)
            changes.enter_context(whole)
        yield


def let_a_cpu_have_fp8_products() -> None:
    """Have a CPU compute products in fp8, too: torch can, slowly."""
    from svg_models.sparse import layers, linears

    layers.refuse_device = lambda device: None  # type: ignore[assignment]
    linears.LEAST_ROWS = 1


def write_table(path: Path) -> None:
    """Fill the table of the judge's page."""
    result = stored(path)
    head = ["attention", "precision", "PSNR to dense", "lost", "SSIM", "PSNR to unfused"]
    lines = [
        [
            row["method"],
            row["precision"],
            quality.decibels(row["psnr"]),
            lost(row, result["rows"]),
            "1" if row["ssim"]["mean"] is None else f"{row['ssim']['mean']:.4f}",
            quality.decibels(row["psnr_to_unfused"]),
        ]
        for row in result["rows"]
    ]
    prompts = "held-out prompts" if result["judge"] == "embedded" else "prompts"
    text = (
        f"{conditions(result['environment'])} {result['prompts']} {prompts}, "
        f"{result['steps']} steps, {result['frames']} frames of "
        f"{result['height']} x {result['width']}; "
        f"SVG2 at {result['density']:.0%}, compensated and routed by error. "
        "Lost: PSNR to dense beside that of fused blocks in bf16, mean over the prompts. "
        f"Noise floor (another dense kernel): {quality.decibels(result['noise_floor'])}.\n\n"
    )
    replace_between(PAGES[result["judge"]], "precision", text + table(head, lines))


def lost(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the decibels that a sparse row loses, with their standard error if clips are known."""
    if row["method"] == "dense" or "blocks" in row["precision"]:
        return ""
    found = row.get("lost")
    if found and found["mean"] is not None:
        error = (found["std"] or 0.0) / len(row["psnrs"]) ** 0.5
        return f"{found['mean']:.2f}{PLUS_MINUS}{error:.2f} dB"
    fused = next(r for r in rows if (r["method"], r["precision"]) == (row["method"], FUSED))
    return f"{fused['psnr']['mean'] - row['psnr']['mean']:.2f} dB"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["run", "table"])
    quality.add_options(parser)
    parser.set_defaults(prompts=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="WORD",
        help="measure only rows with one of these in their names; others of the file stay",
    )  # fmt: skip
    parser.add_argument("--side", type=int, help="of square clips; the judge's first size if none")
    args = parser.parse_args()
    if args.action == "run":
        run(args)
    else:
        write_table(args.output)


if __name__ == "__main__":
    main()
