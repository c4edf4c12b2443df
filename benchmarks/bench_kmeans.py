"""k-means beside its baselines: whole rounds, and assignment and update apart.

As a script it measures and stores: `bench_kmeans.py --baselines FOLDER --out FILE`,
where FOLDER holds the unpacked wheels of `flash-kmeans` 0.3.1 and `fastkmeans` (the former shares
our import name, so it is loaded under another). `tables_kmeans.py` fills the Markdown files and
draws the picture from what is stored. Under pytest-benchmark it times this package alone.

Every row is checked first: our inertia after ten rounds against an fp64 recomputation on a sample
of points, and against the baseline's.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import _harness

import flash_kmeans as fk

ROUNDS = 10
BASELINE = "flash-kmeans 0.3.1"


@dataclass(frozen=True)
class Case:
    """One shape; `group` says which table it belongs to."""

    group: str
    batch: int
    points: int
    dim: int
    clusters: int
    dtype: str = "float16"

    @property
    def name(self) -> str:
        """Return a short label, `batch x points x dim, clusters, dtype`."""
        return f"{self.batch}x{self.points}x{self.dim}, {self.clusters}, {self.dtype}"

    def data(self) -> tuple[Tensor, Tensor]:
        """Return fresh normal points and a start of distinct points."""
        dtype = getattr(torch, self.dtype)
        x = torch.randn(self.batch, self.points, self.dim, device="cuda", dtype=dtype)
        return x, x[:, torch.randperm(self.points, device="cuda")[: self.clusters]].contiguous()


CASES = (
    Case("video", 40, 75_600, 128, 1000, "bfloat16"),
    Case("video", 40, 75_600, 128, 300),
    Case("video", 24, 118_800, 128, 1000),
    Case("video", 32, 65_536, 128, 1000),
    Case("video", 1, 1_048_576, 128, 4096),
    Case("public", 8, 16_384, 128, 100),
    Case("public", 32, 32_768, 128, 1000),
    Case("public", 8, 65_536, 256, 512),
    Case("public", 32, 65_536, 128, 4096),
    Case("public", 8, 131_072, 128, 1000),
    Case("public", 4, 262_144, 128, 8192),
    *(Case("points", 1, n, 128, 1024) for n in (1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)),
    *(Case("clusters", 1, 1 << 19, 128, k) for k in (64, 256, 1024, 4096)),
)


def load_baseline(folder: Path, name: str) -> ModuleType:
    """Import a package from `folder` and keep it apart from one of the same name."""

    def taken() -> list[str]:
        return [m for m in sys.modules if m == name or m.startswith(f"{name}.")]

    ours = {module: sys.modules.pop(module) for module in taken()}
    sys.path.insert(0, str(folder))
    try:
        baseline = importlib.import_module(name)
        for module in taken():
            sys.modules[f"baseline_{module}"] = sys.modules.pop(module)
    finally:
        sys.path.pop(0)
        sys.modules.update(ours)
    return baseline


def plain_round(x: Tensor, centroids: Tensor) -> Tensor:
    """Run one round the way it is usually written in torch: chunked products, `index_add_`."""
    batch, points, dim = x.shape
    clusters = centroids.shape[1]
    norms = centroids.float().square().sum(-1) / 2
    out = torch.empty_like(centroids)
    step = max(1, (1 << 28) // clusters)
    for b in range(batch):
        labels = torch.cat(
            [(part @ centroids[b].T).float().sub_(norms[b]).argmax(1) for part in x[b].split(step)]
        )
        sums = torch.zeros(clusters, dim, device=x.device).index_add_(0, labels, x[b].float())
        sizes = torch.zeros(clusters, device=x.device).index_add_(
            0, labels, torch.ones(points, device=x.device)
        )
        means = (sums / sizes.clamp(min=1).unsqueeze(1)).to(x.dtype)
        out[b] = torch.where((sizes > 0).unsqueeze(1), means, centroids[b])
    return out


def sampled_cost(x: Tensor, centroids: Tensor, rows: int = 2048) -> float:
    """Return the mean squared distance to the nearest centroid in fp64, over a sample."""
    sample = x[:2, :rows].double()
    return float(torch.cdist(sample, centroids[:2].double()).amin(-1).square().mean())


def check(x: Tensor, start: Tensor, baseline: ModuleType | None) -> dict[str, float]:
    """Return fp64 costs of both libraries' centroids after ten rounds, and of our own inertia."""
    ours = fk.kmeans(x, start.shape[1], init=start, max_iter=ROUNDS)
    again = fk.assign(x[:2, :2048], ours.centroids[:2])
    own = ours.centroids[:2].gather(1, again.long().unsqueeze(-1).expand(-1, -1, x.shape[2]))
    by_labels = float((x[:2, :2048].double() - own.double()).square().sum(-1).mean())
    costs = {
        "ours": sampled_cost(x, ours.centroids),
        "ours_by_labels": by_labels,
        "inertia_per_point": float(ours.inertia.double().mean() / x.shape[1]),
    }
    if baseline is not None:
        _, theirs, _ = baseline.batch_kmeans_Euclid(
            x, start.shape[1], max_iters=ROUNDS, tol=-1.0, init_centroids=start
        )
        costs["baseline"] = sampled_cost(x, theirs)
    if abs(by_labels / costs["ours"] - 1) > 1e-3 or costs["ours"] > 1.01 * costs.get(
        "baseline", costs["ours"]
    ):
        raise RuntimeError(f"wrong result, not timed: {costs}")
    return costs


def rounds_of(
    case: Case, x: Tensor, start: Tensor, baseline: ModuleType | None, plain: bool
) -> Any:
    """Return callables that run 1 and 1 + ROUNDS rounds, by name."""
    k = case.clusters
    calls: dict[str, Callable[[], Any]] = {}
    for rounds in (1, 1 + ROUNDS):
        calls[f"ours {rounds}"] = lambda r=rounds: fk.kmeans(x, k, init=start, max_iter=r)
        if baseline is not None:
            calls[f"baseline {rounds}"] = lambda r=rounds: baseline.batch_kmeans_Euclid(
                x, k, max_iters=r, tol=-1.0, init_centroids=start
            )
    if plain:
        calls["plain"] = lambda: plain_round(x, start)
    return calls


def per_round(times: dict[str, list[float]], name: str) -> dict[str, float]:
    """Return milliseconds per round: what the further rounds of a long run take."""
    pairs = zip(times[f"{name} {1 + ROUNDS}"], times[f"{name} 1"], strict=True)
    return _harness.summary([(many - one) / ROUNDS for many, one in pairs])


def measure_case(case: Case, baseline: ModuleType | None, samples: int) -> dict[str, Any]:
    """Check one shape, then time whole rounds, and assignment and update apart."""
    x, start = case.data()
    result: dict[str, Any] = {"case": asdict(case), "check": check(x, start, baseline)}
    plain = case.group == "video" or case.points <= 1 << 20
    times = _harness.interleave(
        rounds_of(case, x, start, baseline, plain), samples=samples, warmup=1
    )
    result["round_ms"] = {n: per_round(times, n) for n in ("ours", "baseline") if f"{n} 1" in times}
    result["ten_rounds_ms"] = {
        n: _harness.summary([t * ROUNDS / (1 + ROUNDS) for t in times[f"{n} {1 + ROUNDS}"]])
        for n in result["round_ms"]
    }
    if plain:
        result["round_ms"]["plain torch"] = _harness.summary(times["plain"])
    result["parts_ms"] = measure_parts(x, start, baseline, samples) if case.group == "video" else {}
    return result


def measure_parts(
    x: Tensor, start: Tensor, baseline: ModuleType | None, samples: int
) -> dict[str, dict[str, float]]:
    """Time assignment and update apart, of both libraries where the baseline is there."""
    labels = fk.assign(x, start)
    calls: dict[str, Callable[[], Any]] = {
        "ours assign": lambda: fk.assign(x, start),
        "ours update": lambda: fk.update(x, labels, start.shape[1], previous=start),
    }
    if baseline is not None:
        squares = (x**2).sum(-1)
        theirs = sys.modules["baseline_flash_kmeans.assign_euclid_triton"].euclid_assign_triton
        calls["baseline assign"] = lambda: theirs(x, start, squares)
        calls["baseline update"] = lambda: baseline.triton_centroid_update_sorted_euclid(
            x, labels, start
        )
    times = _harness.interleave(calls, samples=samples, warmup=1)
    return {name: _harness.summary(values) for name, values in times.items()}


def measure_fastkmeans(folder: Path, case: Case) -> dict[str, Any]:
    """Time `fastkmeans` on one unbatched shape, points on the host as it wants them."""
    module = load_baseline(folder, "fastkmeans")
    x = torch.randn(case.points, case.dim).numpy()
    seconds = {}
    for rounds in (1, 1, 1 + ROUNDS):
        model = module.FastKMeans(
            d=case.dim, k=case.clusters, niter=rounds, tol=-1e9, gpu=True,
            max_points_per_centroid=None,
        )  # fmt: skip
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        model.train(x)
        last.record()
        torch.cuda.synchronize()
        seconds[rounds] = first.elapsed_time(last)
    return {"case": asdict(case), "round_ms": (seconds[1 + ROUNDS] - seconds[1]) / ROUNDS}


def main() -> None:
    """Measure every case and store one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baselines", type=Path, help="folder with the baselines' unpacked wheels")
    parser.add_argument("--out", type=Path, help="file to write, JSON")
    parser.add_argument("--commit", help="commit that is measured, where git is not at hand")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--warm", help="i/n: only compile, the i-th of n shares of the cases")
    options = parser.parse_args()
    baseline = load_baseline(options.baselines, "flash_kmeans") if options.baselines else None
    if options.warm:
        part, parts = map(int, options.warm.split("/"))
        for case in CASES[part::parts]:
            x, start = case.data()
            rounds_of(case, x, start, None, False)["ours 1"]()
            if baseline is not None:
                rounds_of(case, x, start, baseline, False)["baseline 1"]()
        return
    result: dict[str, Any] = {
        "environment": _harness.environment(options.commit),
        "copy_gbps": _harness.copy_bandwidth(),
        "rows": [],
    }
    for case in CASES:
        row = measure_case(case, baseline, options.samples)
        result["rows"].append(row)
        medians = {name: round(v["median"], 3) for name, v in row["round_ms"].items()}
        parts = {name: round(v["median"], 3) for name, v in row["parts_ms"].items()}
        print(case.group, case.name, medians, parts, flush=True)
        if options.out:
            _harness.store(options.out, result)
    if options.baselines and (options.baselines / "fastkmeans").exists():
        result["fastkmeans"] = measure_fastkmeans(options.baselines, CASES[4])
        print("fastkmeans", result["fastkmeans"]["round_ms"])
    if options.out:
        _harness.store(options.out, result)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_rounds(benchmark: Any, case: Case) -> None:
    """Time ten rounds under pytest-benchmark."""
    x, start = case.data()
    check(x, start, None)

    def run() -> None:
        fk.kmeans(x, case.clusters, init=start, max_iter=ROUNDS)
        torch.cuda.synchronize()

    benchmark(run)


if __name__ == "__main__":
    main()
