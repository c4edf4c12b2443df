"""Fit densities to what steps and layers of a judge cost, and compare with other schedules.

    export PYTHONPATH=packages/svg-models  # for the scenes of the training script
    python benchmarks/quality_fit.py run --output benchmarks/results/h100/quality_fit.json
    python benchmarks/quality_fit.py table benchmarks/results/h100/quality_fit.json

Steps and layers are measured as `svg tune --fit` does, each group alone sparse, on prompts of their
own. Then every schedule is run at the same density of all calls, dense steps and the probes' pass
included, on prompts that nothing was fitted to. A minute and a half on an H100.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import quality
from _harness import PLUS_MINUS, ROOT, replace_between, store, stored, table
from _quality_cases import BEST, PRESET, SPENT, build, probe_density

from svg_attention import Schedule, TokenLayout
from svg_models import sparsify
from svg_models.loading import Geometry
from svg_models.tuning.fit import FITTED, Fit, fit, schedule_of_only
from svg_models.tuning.search import SCOUTS

PAGE = ROOT / "docs" / "guide" / "schedule.md"
TOTAL, ALONE = 0.25, 0.2
FLAT = "one density"
METHODS = (f"{BEST}, spent by error", SPENT, PRESET)
DENSE_STEPS = (1, 2, 3)


class Bench:
    """A judge, its prompts to fit to and to compare on, and their dense clips.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began = args, time.perf_counter()
        self.pipe, fitted = quality.load(args, 0)
        self.judge = quality.find_judge(
            args.model, first=quality.FIRST_PROMPT, prompts=args.prompts
        )
        self.size = self.judge.sizes[args.size or self.judge.measured[0]]
        shape = {"height": self.size[0], "width": self.size[1], "frames": args.frames}
        self.tokens = Geometry.of(self.pipe).tokens(**shape)
        self.layout = TokenLayout(grid=(1, 1, self.tokens))
        self.branches = 2 if args.guidance > 1 else 1
        self.prompts = {
            "fit": (fitted.prompts, 0),
            "test": (self.judge.prompts, quality.FIRST_PROMPT),
        }
        self.dense = {which: self.sample(which) for which in self.prompts}

    def sample(self, which: str) -> Any:
        """Return the clips of one set of prompts."""
        prompts, first = self.prompts[which]
        return quality.sample(self.pipe, prompts, self.size, self.args, first=first)

    def run(self, which: str, method: str, density: float, schedule: Schedule) -> dict[str, Any]:
        """Return how close clips are, and what of all pairs was read."""
        with sparsify(self.pipe, build(method, density, self.tokens), schedule, fuse=False) as run:
            psnr = quality.closeness(self.sample(which), self.dense[which])["psnr"]
            stats = run.stats()
        return {
            "psnr": quality.summary(psnr),
            "psnrs": quality.plain(psnr),
            "total": round(stats.mean_density_with_dense_calls + stats.mean_probe_density, 4),
        }

    def measure(self) -> Fit:
        """Return what steps and layers cost."""

        def psnr(name: str, density: float) -> float | None:
            schedule = schedule_of_only(name, density) if name else Schedule.sparse()
            found = self.run("fit", METHODS[0], density, schedule)["psnr"]["mean"]
            self.say(f"{name or 'all'} at {density:.0%}: {found}")
            return None if found is None else float(found)

        layers = len(self.pipe.transformer.blocks)
        return fit(psnr, density=ALONE, scouts=SCOUTS, steps=self.args.steps, layers=layers)

    def schedules(self, method: str, found: Fit) -> Iterator[tuple[str, float, Schedule]]:
        """Yield name, density of sparse calls and schedule at the same density of all calls."""
        made = build(method, 0.5, self.tokens)
        probes = probe_density(made, self.layout, branches=self.branches)
        steps = self.args.steps
        yield FLAT, TOTAL - probes, Schedule.sparse()
        shared = getattr(made, "share_steps", 1)
        for name in FITTED:
            yield name, TOTAL - probes, found.schedule(name, TOTAL - probes, alike=shared)
        for dense in DENSE_STEPS:
            share = dense / steps
            left = (TOTAL - share) / (1 - share) - probes
            if left > 0:
                schedule = Schedule(dense_steps=(dense + 0.5) / steps, dense_layers=0.0)
                yield f"first {share:.0%} dense", left, schedule

    def say(self, text: str) -> None:
        """Print with the seconds that have passed."""
        print(f"{time.perf_counter() - self.began:6.1f} s  {text}", flush=True)


def run(args: argparse.Namespace) -> None:
    """Measure and store."""
    bench = Bench(args)
    found = bench.measure()
    result: dict[str, Any] = {
        "environment": quality.environment(args), "judge": bench.judge.name,
        "frames": args.frames, "height": bench.size[0], "width": bench.size[1],
        "steps": args.steps, "prompts": args.prompts, "total": TOTAL, "fit": asdict(found),
        "rows": [],
    }  # fmt: skip
    for method in METHODS:
        for name, density, schedule in bench.schedules(method, found):
            row = bench.run("test", method, density, schedule)
            row |= {"schedule": name, "method": method, "config": schedule.to_dict()}
            result["rows"].append(row)
            bench.say(f"{name}, {method}: {row['psnr']['mean']} dB, total {row['total']:.1%}")
            store(args.output, result)


def write(path: Path) -> None:
    """Write the table of stored results into the page on schedules."""
    result = stored(path)
    env = result["environment"]
    names = list(dict.fromkeys(row["schedule"] for row in result["rows"]))
    cells = {(row["schedule"], row["method"]): row for row in result["rows"]}

    def cell(name: str, method: str) -> str:
        row = cells.get((name, method))
        if row is None:
            return ""
        return f"{row['psnr']['mean']:.1f}{PLUS_MINUS}{row['psnr']['std']:.1f}"

    head = ("schedule", "planned in every step, spent by error", "in every second", "not spent")
    lines = [(name, *(cell(name, method) for method in METHODS)) for name in names]
    text = (
        f"PSNR in dB at {result['total']:.0%} of all pairs, probes and dense steps included, "
        f"{result['steps']} steps, {result['frames']} x {result['height']} x {result['width']}, "
        f"{result['prompts']} prompts that nothing was fitted to; {env['dtype']} on "
        f"{env['device']}, torch {env['torch']}, commit {env['commit']}. Mean{PLUS_MINUS}standard "
        "deviation over prompts.\n\n"
    )
    replace_between(PAGE, "fit", text + table(head, lines))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    measure = commands.add_parser("run", help="measure and store")
    quality.add_options(measure)
    measure.add_argument("--steps", type=int, default=20)
    measure.add_argument("--size", help="of the judge's clips; the first one if not given")
    measure.set_defaults(call=run)
    tables = commands.add_parser("table", help="write the table")
    tables.add_argument("results", type=Path)
    tables.set_defaults(call=lambda args: write(args.results))
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
