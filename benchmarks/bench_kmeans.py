"""k-means beside its baselines: whole rounds, and assignment and update apart.

As a script it measures and stores, in about a minute and a half on an H100 with 16 cores:

    python benchmarks/bench_kmeans.py --baselines FOLDER --before SRC --out FILE

FOLDER holds the wheels of `flash-kmeans` 0.3.1 and, if it is to be measured, `fastkmeans`, as
`pip download --no-deps` leaves them (the former shares our import name, so it is loaded under
another). SRC, if given, is `packages/flash-kmeans/src` of an earlier commit, whose backend takes
turns with this one's. Kernels are compiled first, by several processes. `tables_kmeans.py` fills
the Markdown files and draws the picture from what is stored. Under pytest-benchmark it times this
package alone.

Every row is checked first: our inertia after ten rounds against an fp64 recomputation on a sample
of points, and against the baseline's.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import zipfile
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
from flash_kmeans.triton import launch

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
    text: int = 0

    @property
    def name(self) -> str:
        """Return a short label, `batch x points x dim, clusters, dtype`."""
        gap = f" of {self.points + self.text}" if self.text else ""
        return f"{self.batch}x{self.points}{gap}x{self.dim}, {self.clusters}, {self.dtype}"

    def data(self) -> tuple[Tensor, Tensor]:
        """Return fresh normal points and a start of distinct points."""
        dtype = getattr(torch, self.dtype)
        rows = self.points + self.text
        x = torch.randn(self.batch, rows, self.dim, device="cuda", dtype=dtype)[:, : self.points]
        return x, x[:, torch.randperm(self.points, device="cuda")[: self.clusters]].contiguous()


# What attention clusters: the video of a sequence that ends in text, so with gaps between heads.
HUNYUAN = Case("video", 24, 118_800, 128, 1000, "bfloat16", text=256)
BIG = Case("video", 1, 1_048_576, 128, 4096)
# Where launching and where sorting were said to dominate: one round is taken apart by kernel.
PROFILED = ("8x16384x128, 100, float16", "4x262144x128, 8192, float16")
CASES = (
    Case("video", 40, 75_600, 128, 1000, "bfloat16"),
    Case("video", 40, 75_600, 128, 300),
    Case("video", 24, 118_800, 128, 1000),
    HUNYUAN,
    Case("video", 32, 65_536, 128, 1000),
    BIG,
    Case("public", 8, 16_384, 128, 100),
    Case("public", 32, 32_768, 128, 1000),
    Case("public", 8, 65_536, 256, 512),
    Case("public", 32, 65_536, 128, 4096),
    Case("public", 8, 131_072, 128, 1000),
    Case("public", 4, 262_144, 128, 8192),
    *(Case("points", 1, n, 128, 1024) for n in (1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)),
    *(Case("clusters", 1, 1 << 19, 128, k) for k in (64, 256, 1024, 4096)),
)


def unpacked(folder: Path) -> Path:
    """Return a folder to import from: wheels that lie in `folder` are unpacked into another."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        return folder
    target = Path(tempfile.mkdtemp(prefix="baselines-"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return target


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


def load_before(source: Path) -> ModuleType:
    """Import the Triton backend of another commit from its source, beside this one's.

    The package's own `__init__` would register its operators a second time, so it is left out.
    """
    package = ModuleType("kmeans_before")
    package.__path__ = [str(source / "flash_kmeans")]
    sys.modules["kmeans_before"] = package
    return importlib.import_module("kmeans_before.triton.launch")


@dataclass(frozen=True)
class Peers:
    """Hold what is measured beside this package; None for what is not there."""

    baseline: ModuleType | None
    before: ModuleType | None


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
            x.contiguous(), start.shape[1], max_iters=ROUNDS, tol=-1.0, init_centroids=start
        )
        costs["baseline"] = sampled_cost(x, theirs)
    if abs(by_labels / costs["ours"] - 1) > 1e-3 or costs["ours"] > 1.01 * costs.get(
        "baseline", costs["ours"]
    ):
        raise RuntimeError(f"wrong result, not timed: {costs}")
    return costs


def rounds_of(case: Case, x: Tensor, start: Tensor, peers: Peers, plain: bool) -> Any:
    """Return callables that run 1 and 1 + ROUNDS rounds, by name."""
    k, baseline, before = case.clusters, peers.baseline, peers.before
    # The baseline takes no gaps between batches; its copy is not counted.
    packed = x.contiguous()
    calls: dict[str, Callable[[], Any]] = {}
    for rounds in (1, 1 + ROUNDS):
        calls[f"ours {rounds}"] = lambda r=rounds: fk.kmeans(x, k, init=start, max_iter=r)
        if baseline is not None:
            calls[f"baseline {rounds}"] = lambda r=rounds: baseline.batch_kmeans_Euclid(
                packed, k, max_iters=r, tol=-1.0, init_centroids=start
            )
        if before is not None:
            calls[f"before {rounds}"] = lambda r=rounds: before.lloyd(
                x, start, None, "euclidean", "keep", r, False
            )
    if plain:
        calls["plain"] = lambda: plain_round(x, start)
    return calls


def per_round(times: dict[str, list[float]], name: str) -> dict[str, float]:
    """Return milliseconds per round: what the further rounds of a long run take."""
    pairs = zip(times[f"{name} {1 + ROUNDS}"], times[f"{name} 1"], strict=True)
    return _harness.summary([(many - one) / ROUNDS for many, one in pairs])


def measure_case(case: Case, peers: Peers, samples: int) -> dict[str, Any]:
    """Check one shape, then time whole rounds, and assignment and update apart."""
    x, start = case.data()
    checked = check(x, start, peers.baseline)
    if peers.before is not None:
        check_before(x, start, peers.before)
    result: dict[str, Any] = {
        "case": asdict(case),
        "check": checked,
        "hopper": launch.suits_hopper(x, case.clusters, "euclidean"),
    }
    plain = case.group == "video" or case.points <= 1 << 20
    times = _harness.interleave(rounds_of(case, x, start, peers, plain), samples=samples, warmup=1)
    whole = [n for n in ("ours", "baseline", "before") if f"{n} 1" in times]
    result["round_ms"] = {n: per_round(times, n) for n in whole}
    result["ten_rounds_ms"] = {
        n: _harness.summary([t * ROUNDS / (1 + ROUNDS) for t in times[f"{n} {1 + ROUNDS}"]])
        for n in whole
    }
    if plain:
        result["round_ms"]["plain torch"] = _harness.summary(times["plain"])
    apart = case.group == "video" or case.name in PROFILED
    result["parts_ms"] = measure_parts(x, start, peers, samples) if apart else {}
    if case.name in PROFILED:
        result["round_us"] = kernels_of_rounds(x, start, peers)
        result["graph_ms"] = graph_rounds(case, x, start)
    return result


def check_before(x: Tensor, start: Tensor, before: ModuleType) -> None:
    """Raise if the backend of another commit ends elsewhere than this one's."""
    theirs = before.lloyd(x, start, None, "euclidean", "keep", ROUNDS, False)[1]
    ours = fk.kmeans(x, start.shape[1], init=start, max_iter=ROUNDS).centroids
    one, two = sampled_cost(x, ours), sampled_cost(x, theirs)
    if abs(one / two - 1) > 3e-3:
        raise RuntimeError(f"this commit ends at {one}, the one before at {two}")


def measure_parts(
    x: Tensor, start: Tensor, peers: Peers, samples: int
) -> dict[str, dict[str, float]]:
    """Time assignment and update apart, of all libraries that are there."""
    labels = fk.assign(x, start)
    calls: dict[str, Callable[[], Any]] = {
        "ours assign": lambda: fk.assign(x, start),
        "ours update": lambda: fk.update(x, labels, start.shape[1], previous=start),
    }
    before = peers.before
    if before is not None:
        calls["before assign"] = lambda: before.assign(x, start, "euclidean")
        calls["before update"] = lambda: before.update(x, labels, start, "euclidean", None)
    if peers.baseline is not None:
        baseline = peers.baseline
        packed = x.contiguous()
        squares = (packed**2).sum(-1)
        theirs = sys.modules["baseline_flash_kmeans.assign_euclid_triton"].euclid_assign_triton
        calls["baseline assign"] = lambda: theirs(packed, start, squares)
        calls["baseline update"] = lambda: baseline.triton_centroid_update_sorted_euclid(
            packed, labels, start
        )
    times = _harness.interleave(calls, samples=samples, warmup=1)
    return {name: _harness.summary(values) for name, values in times.items()}


def kernels_of_rounds(x: Tensor, start: Tensor, peers: Peers) -> dict[str, dict[str, float]]:
    """Return microseconds of each kernel in a round, an average over ten, ours and before."""
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: fk.kmeans(x, start.shape[1], init=start, max_iter=ROUNDS)
    }
    before = peers.before
    if before is not None:
        calls["before"] = lambda: before.lloyd(x, start, None, "euclidean", "keep", ROUNDS, False)
    found = {}
    for name, call in calls.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        times = ((e.key[:60], e.device_time_total / ROUNDS) for e in profile.key_averages())
        found[name] = {key: round(time, 1) for key, time in times if time > 0}
        print(name, found[name], flush=True)
    return found


def graph_rounds(case: Case, x: Tensor, start: Tensor) -> float:
    """Return milliseconds per round where a CUDA graph holds ten: the floor without launching."""
    fk.kmeans(x, case.clusters, init=start, max_iter=ROUNDS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fk.kmeans(x, case.clusters, init=start, max_iter=ROUNDS)
    return (
        _harness.summary(_harness.interleave({"": graph.replay}, samples=9)[""])["median"] / ROUNDS
    )


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


def compile_first(workers: int) -> None:
    """Compile every kernel, peers' too, in processes that each take a share of the cases.

    Raises:
        SystemExit: if one of them fails.
    """
    command = [sys.executable, *sys.argv]
    running = [
        subprocess.Popen([*command, "--warm", f"{i}/{workers}"], env=os.environ)
        for i in range(workers)
    ]
    if any([process.wait() for process in running]):
        raise SystemExit("a kernel did not compile; see above")


def warm(share: str, peers: Peers) -> None:
    """Run the i-th of n shares of the cases once, for the compiler's sake."""
    part, parts = map(int, share.split("/"))
    for case in CASES[part::parts]:
        x, start = case.data()
        for name, call in rounds_of(case, x, start, peers, False).items():
            if name.endswith(" 1"):
                call()
    torch.cuda.synchronize()


def main() -> None:
    """Measure every case and store one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baselines", type=Path, help="folder with the baselines' wheels")
    parser.add_argument("--before", type=Path, help="source folder of an earlier commit")
    parser.add_argument("--out", type=Path, help="file to write, JSON")
    parser.add_argument("--commit", help="commit that is measured, where git is not at hand")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--workers", type=int, default=8, help="processes that compile at first")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.workers and not options.warm:
        compile_first(options.workers)
    folder = unpacked(options.baselines) if options.baselines else None
    peers = Peers(
        baseline=load_baseline(folder, "flash_kmeans") if folder else None,
        before=load_before(options.before) if options.before else None,
    )
    if options.warm:
        warm(options.warm, peers)
        return
    result: dict[str, Any] = {
        "environment": _harness.environment(options.commit),
        "copy_gbps": _harness.copy_bandwidth(),
        "rows": [],
    }
    for case in CASES:
        row = measure_case(case, peers, options.samples)
        result["rows"].append(row)
        medians = {name: round(v["median"], 3) for name, v in row["round_ms"].items()}
        parts = {name: round(v["median"], 3) for name, v in row["parts_ms"].items()}
        print(case.group, case.name, medians, parts, flush=True)
        if options.out:
            _harness.store(options.out, result)
    if folder is not None and (folder / "fastkmeans").exists():
        result["fastkmeans"] = measure_fastkmeans(folder, BIG)
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
