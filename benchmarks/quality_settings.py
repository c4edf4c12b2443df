"""Measure which settings of a compensated SVG2 serve the short clips of the embedded model best.

    python benchmarks/quality_settings.py --output benchmarks/results/h200/quality_settings.json
    python benchmarks/quality_settings.py rounds --prompts 16 \
        --output benchmarks/results/h100/quality_rounds.json

The recipes of short clips and small models rest on the first: a budget for every tile against one
that follows the attention mass, routing by mass or by error, rounds of k-means at the start, and
queries that share a probe. The second, a minute on an H100, asks how many rounds of k-means the
first sparse step needs and how many a later one, by the methods that recipes and presets use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import quality

from svg_attention import SVG2, Schedule
from svg_models import sparsify
from svg_models.loading import Geometry
from svg_models.recipes import cluster_counts

SCHEDULE = Schedule(dense_steps=0.2, dense_layers=0.03)


def compensated(tokens: int) -> dict[str, Any]:
    """Return what all settings share, as arguments of SVG2."""
    q_clusters, k_clusters = cluster_counts(tokens, 300, 1000)
    return {"q_clusters": q_clusters, "k_clusters": k_clusters, "compensate": True}


def rounds(tokens: int) -> Iterator[dict[str, Any]]:
    """Yield settings that differ in their rounds of k-means alone, by method."""
    base = compensated(tokens) | {"density": 0.25}
    for method in ({}, {"route": "error", "correct_bias": True}, {"metric": "response"}):
        for first, later in ((50, 2), (10, 2), (5, 2), (50, 1), (10, 1), (5, 1), (10, 4)):
            yield base | method | {"first_iterations": first, "step_iterations": later}


def settings(tokens: int) -> Iterator[dict[str, Any]]:
    """Yield what is compared, as arguments of SVG2."""
    base = compensated(tokens)
    budgets = ({"top_p": 0.9}, {"top_p": 0.9, "min_keep": 0.2}, {"density": 0.33})
    for budget in budgets:
        for route in ("mass", "error"):
            yield base | budget | {"route": route}
    for rounds in (25, 10, 5, 3):
        yield base | {"top_p": 0.9, "first_iterations": rounds}
    for rounds in (10, 5):
        yield base | {"top_p": 0.9, "route": "error", "first_iterations": rounds}
    yield base | {"density": 0.33, "route": "error", "first_iterations": 10}
    for rows in (32, 64, 128):
        for route in ("mass", "error"):
            yield base | {"density": 0.33, "route": route, "probe_rows": rows}
    yield base | {"density": 0.25, "route": "error"}


SUBJECTS = {"settings": settings, "rounds": rounds}


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("which", nargs="?", choices=SUBJECTS, default="settings")
    quality.add_options(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", type=int, default=128)
    args = parser.parse_args()
    pipe, judge = quality.load(args)
    prompts, size = judge.prompts, (args.side, args.side)
    dense = quality.sample(pipe, prompts, size, args)
    shape = {"height": args.side, "width": args.side, "frames": args.frames}
    tokens = Geometry.of(pipe).tokens(**shape)
    rows: list[dict[str, Any]] = []
    for chosen in SUBJECTS[args.which](tokens):
        with sparsify(pipe, SVG2(**chosen), SCHEDULE, backend=args.backend) as run:
            close = quality.closeness(quality.sample(pipe, prompts, size, args), dense)
            density = round(run.stats().mean_density, 3)
        means = {name: round(sum(values) / len(values), 2) for name, values in close.items()}
        rows.append({"settings": chosen, "density": density, **means})
        print(rows[-1], flush=True)
        stored = {"environment": quality.environment(args), "side": args.side, "rows": rows}
        args.output.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
