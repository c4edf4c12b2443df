"""Measure densities that follow the probes' own error against one density for all calls.

    export PYTHONPATH=packages/svg-models  # for the scenes of the training script
    python benchmarks/quality_budgets.py --output benchmarks/results/h100/quality_budgets.json

The pass of the probes finds what leaving out each cluster costs a tile. So it could say how much a
call should read: until its estimated error, as a share of its output, is the same for all calls;
until what another key would save is the same everywhere; or, more gently, more in layers or in
steps whose error is larger. Each rule is solved for the same mean density from the curves that a
run at one density records, and run. Two rules turn the sign round, as a check on the idea.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import quality
import torch
from torch import Tensor

from svg_attention import SVG2, Schedule, cluster_counts
from svg_attention.planning import clusters as planning
from svg_attention.tiles import match_heads
from svg_models import sparsify
from svg_models.loading import Geometry

LEAST, MOST = 0.03, 0.95
GRID = (*(g for g in (0.01 * 1.2**i for i in range(26)) if g < 1), 1.0)
# Part of an equal share that every tile keeps where the rest goes where it gains most.
KEPT = 0.5
Room = Callable[[int, Tensor, Tensor, int], Tensor]


@dataclass
class Seen:
    """Hold what a run's calls said, in their order.

    Attributes:
        curves: estimated error at the densities of `GRID`, as shares of the output's variance.
        gains: what a key of each cluster saves, likewise, and the keys of it, `[2, X]`.
        tiles: tiles of a call.
        keys: keys of a call.
    """

    curves: list[Tensor] = field(default_factory=list)
    gains: list[Tensor] = field(default_factory=list)
    tiles: int = 0
    keys: int = 0


def error_curve(gain: Tensor, sizes: Tensor, keys: int) -> Tensor:
    """Return what tiles leave out on average at each density of `GRID`, best clusters read first.

    Args:
        gain: `[B, H, T, C]`, error of a cluster that is not read, per key.
        sizes: `[B, H, C]`.
        keys: of a call.
    """
    ranked, order = gain.sort(dim=-1, descending=True)
    counts = sizes.float()[:, :, None].expand_as(gain).gather(-1, order)
    running, lost = counts.cumsum(dim=-1), ranked * counts
    return torch.stack([torch.where(running <= d * keys, 0, lost).sum(-1).mean() for d in GRID])


@contextmanager
def budgets(room: Room) -> Iterator[Seen]:
    """Have every call read what a rule says, `room(call, gain, sizes, keys)` for each tile."""
    seen, original = Seen(), planning.select_clusters

    def select(
        planner: Any, means: Tensor, key: Tensor, value: Tensor, clusters: Any,
        value_means: Tensor, selection: Any, scale: float, length: int,
    ) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        sizes = match_heads(clusters.sizes, means.shape[1])
        error, bias, output, _ = planner.probe_sums(
            means, key, value, clusters.order, clusters.centroids, value_means, clusters.sizes,
            length, selection.probe_rows, scale, True,
        )  # fmt: skip
        gain, keys = error / output.float().var(dim=2).sum(-1).mean(), key.shape[2]
        call = len(seen.curves)
        seen.curves.append(error_curve(gain, sizes, keys).cpu())
        counts = sizes.float()[:, :, None].expand_as(gain)
        seen.gains.append(torch.stack([gain.flatten(), counts.flatten()]).cpu())
        seen.tiles, seen.keys = gain[..., 0].numel(), keys
        read = room(call, gain, sizes, keys).clamp(max=keys)
        return planner.keep_budget(error, sizes, read.expand(error.shape[:3])), bias, None

    planning.select_clusters = select  # type: ignore[assignment]
    try:
        yield seen
    finally:
        planning.select_clusters = original


def by_call(densities: Sequence[float]) -> Room:
    """Return a rule that gives each call a density."""
    return lambda call, gain, sizes, keys: gain.new_full((1, 1, 1), densities[call] * keys)


def by_gain(limit: float, density: float) -> Room:
    """Return a rule by which tiles read what saves more than a limit, half of a density besides."""

    def room(call: int, gain: Tensor, sizes: Tensor, keys: int) -> Tensor:
        share = torch.where(gain >= limit, sizes.float()[:, :, None], 0.0).sum(dim=-1)
        return KEPT * density * keys + (1 - KEPT) * share

    return room


def solve(mean: Callable[[float], float], target: float) -> float:
    """Return where a falling function between 1e-12 and 100 comes to a target."""
    low, high = 1e-12, 100.0
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if mean(middle) > target else (low, middle)
    return high


def rules(seen: Seen, density: float, steps: int) -> Iterator[tuple[str, Room]]:
    """Yield rules that come to a mean density, from what a run at that density recorded."""
    calls = len(seen.curves)

    def needed(error: float) -> list[float]:
        found = (
            next((d for d, e in zip(GRID, c.tolist(), strict=True) if e <= error), MOST)
            for c in seen.curves
        )
        return [min(max(d, LEAST), MOST) for d in found]

    def read(limit: float) -> float:
        total = sum(float(g[1][g[0] >= limit].sum()) for g in seen.gains)
        return total / (seen.tiles * seen.keys * calls)

    yield (
        "the same error in every call",
        by_call(needed(solve(lambda e: sum(needed(e)) / calls, density))),
    )
    yield "the same gain everywhere, half kept", by_gain(solve(read, density), density)
    nearest = min(range(len(GRID)), key=lambda i: abs(GRID[i] - density))
    errors = torch.stack([c[nearest] for c in seen.curves]).view(steps, -1)
    layers = errors.unflatten(1, (2, -1)).mean(dim=(0, 1)).repeat(2).expand(steps, -1)
    for word, means in (
        ("layers", layers), ("steps", errors.mean(dim=1, keepdim=True).expand_as(errors)),
    ):  # fmt: skip
        for power in (0.25, -0.25):
            weight = means**power
            shares = (density * weight / weight.mean()).flatten().clamp(max=MOST)
            yield f"{word} by error^{power:g}", by_call(shares.tolist())


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    quality.add_options(parser)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.2)
    args = parser.parse_args()
    pipe, judge = quality.load(args)
    prompts, size = judge.prompts, (args.side, args.side)
    dense = quality.sample(pipe, prompts, size, args)
    shape = {"height": args.side, "width": args.side, "frames": args.frames}
    counts = cluster_counts(Geometry.of(pipe).tokens(**shape), 300, 1000)
    method = SVG2(
        q_clusters=counts[0], k_clusters=counts[1], density=args.density, compensate=True,
        route="error", correct_bias=True, first_iterations=10,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []

    def measure(name: str, room: Room) -> Seen:
        with budgets(room) as seen, sparsify(pipe, method, Schedule.sparse()) as run:
            close = quality.closeness(quality.sample(pipe, prompts, size, args), dense)
            stats = run.stats()
        by_step = {str(k): round(v, 3) for k, v in stats.density_by_step.items()}
        found = {name: quality.summary(values) for name, values in close.items()}
        density = round(stats.mean_density, 4)
        rows.append({"rule": name, "density": density, "by_step": by_step, **found})
        print(name, density, found["psnr"], flush=True)
        stored = {
            "environment": quality.environment(args), "side": args.side, "steps": args.steps,
            "prompts": prompts, "rows": rows,
        }  # fmt: skip
        args.output.write_text(json.dumps(stored, indent=1) + "\n")
        return seen

    calls = 2 * args.steps * 64
    seen = measure("one density", by_call([args.density] * calls))
    for name, room in rules(seen, args.density, args.steps):
        measure(name, room)


if __name__ == "__main__":
    main()
