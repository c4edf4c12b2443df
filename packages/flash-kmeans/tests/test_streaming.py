"""Points in chunks and over processes give what all points at once give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from kmeans_member import member, refused_member
from kmeans_oracles import blobs

import flash_kmeans as fk

METRICS = ("euclidean", "cosine", "dot")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_stream_equals_in_memory(metric: str, weighted: bool) -> None:
    x = blobs(1, 1000, 7, 6)[0] + 3
    weight = torch.rand(1000, generator=torch.Generator().manual_seed(1)) if weighted else None
    arguments = {"init": x[:6].clone(), "metric": metric, "max_iter": 4, "sample_weight": weight}
    whole = fk.kmeans(x, 6, **arguments)
    for rows in (1000, 333, 90):
        parts = fk.kmeans_stream(x, 6, chunk_rows=rows, device="cpu", progress=False, **arguments)
        assert torch.equal(parts.labels, whole.labels)
        assert torch.equal(parts.sizes.int(), whole.sizes)
        torch.testing.assert_close(parts.centroids, whole.centroids)
        assert parts.inertia == pytest.approx(float(whole.inertia), rel=1e-5)


def test_kmeans_stream_takes_a_row_at_a_time() -> None:
    x = blobs(1, 30, 3, 3)[0]
    whole = fk.kmeans(x, 3, init=x[:3], max_iter=2)
    parts = fk.kmeans_stream(
        x, 3, init=x[:3], max_iter=2, chunk_rows=1, device="cpu", progress=False
    )
    assert torch.equal(parts.labels, whole.labels)
    torch.testing.assert_close(parts.centroids, whole.centroids)


def test_kmeans_stream_reads_a_memory_map_and_draws_the_same_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = blobs(1, 700, 4, 5)[0]
    stored = np.memmap(tmp_path / "points.f32", np.float32, "w+", shape=(700, 4))
    stored[:] = x.numpy()
    stored.flush()
    mapped = np.memmap(tmp_path / "points.f32", np.float32, "r", shape=(700, 4))
    parts = fk.kmeans_stream(
        mapped,
        5,
        chunk_rows=100,
        device="cpu",
        max_iter=3,
        generator=torch.Generator().manual_seed(7),
    )
    whole = fk.kmeans(x, 5, max_iter=3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(parts.labels, whole.labels)
    shown = capsys.readouterr().err
    assert "21/21" in shown
    assert "s left" in shown


def test_kmeans_stream_stops_once_settled_and_refuses_what_it_cannot_do() -> None:
    x = blobs(1, 300, 3, 3)[0]
    settled = fk.kmeans_stream(
        x, 3, init=x[:3], tol=1e-12, max_iter=99, device="cpu", progress=False
    )
    assert 1 < settled.n_iter < 99
    x[7] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        fk.kmeans_stream(x, 3, init=x[:3], device="cpu", progress=False)
    with pytest.raises(ValueError, match=r"'k-means\|\|'"):
        fk.kmeans_stream(x, 3, init="k-means++", device="cpu")
    with pytest.raises(ValueError, match="source"):
        fk.kmeans_stream(x[None], 3, device="cpu")


@pytest.mark.parametrize(
    "kind",
    ["uint8", "int8", "int16", "uint16", "int32", "int64", "uint32", "bool", ">f4", "<f8", ">i2"],
)
def test_kmeans_stream_reads_every_kind_of_number(kind: str) -> None:
    numbers = np.random.default_rng(0).integers(0, 120, size=(200, 3))
    source = (numbers > 60 if kind == "bool" else numbers).astype(kind)
    exact = torch.from_numpy(source.astype(np.float64))
    expected = fk.kmeans(exact, 4, init=exact[:4], max_iter=3)
    for stored in (source, np.asfortranarray(source), np.repeat(source, 2, axis=0)[::2]):
        parts = fk.kmeans_stream(
            stored, 4, init=source[:4], max_iter=3, chunk_rows=60, device="cpu", progress=False
        )
        assert torch.equal(parts.labels, expected.labels)
        assert parts.inertia == pytest.approx(float(expected.inertia), rel=1e-5)
    wide = {"int32", "int64", "uint32", "<f8"}
    assert parts.centroids.dtype == (torch.float64 if kind in wide else torch.float32)
    reversed_rows = fk.kmeans_stream(
        source[::-1], 4, init=source[:4], max_iter=3, device="cpu", progress=False
    )
    assert torch.equal(reversed_rows.labels.flip(0), expected.labels)


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (np.zeros((4, 2), complex), TypeError, "real numbers"),
        (np.array([["a", "b"]]), TypeError, "real numbers"),
        ([[1.0, 2.0]], TypeError, "CPU tensor or a NumPy array"),
        (np.zeros(4), ValueError, r"must be \[N, D\]"),
        (np.zeros((0, 4)), ValueError, "empty"),
    ],
)
def test_kmeans_stream_names_what_it_cannot_read(source, error: type, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        fk.kmeans_stream(source, 1, device="cpu", progress=False)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_stream_draws_a_scalable_start(metric: str, weighted: bool) -> None:
    x = blobs(1, 900, 4, 12)[0] + 2
    options = {"metric": metric, "max_iter": 1, "sample_weight": None}
    if weighted:
        options["sample_weight"] = weight = torch.ones(900)
        x[::3], weight[::3] = 1e3, 0
    arguments = {**options, "chunk_rows": 250, "device": "cpu", "progress": False}
    found, random, whole = 0.0, 0.0, 0.0
    for seed in range(4):
        source = torch.Generator()
        for init in ("k-means||", "random"):
            parts = fk.kmeans_stream(
                x, 12, init=init, generator=source.manual_seed(seed), **arguments
            )
            assert int(parts.sizes.sum()) == 900
            found += parts.inertia if init == "k-means||" else 0
            random += parts.inertia if init == "random" else 0
        whole += float(
            fk.kmeans(
                x, 12, init="k-means++", generator=source.manual_seed(seed), **options
            ).inertia
        )
    if metric != "dot":  # which lowers no objective
        assert found < random
        assert found < 1.05 * whole


def test_kmeans_stream_draws_a_scalable_start_among_few_distinct_points() -> None:
    x = torch.eye(3).repeat(20, 1)
    for clusters in (3, 5, 60):
        parts = fk.kmeans_stream(
            x, clusters, init="k-means||", max_iter=2, device="cpu", progress=False
        )
        assert parts.centroids.shape == (clusters, 3)
        assert torch.isfinite(parts.centroids).all()
    assert parts.inertia == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kmeans_stream_keeps_the_digits_of_small_angles(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    y = (torch.randn(500, 32, generator=source) * 0.5 + 100).to(dtype)
    parts = fk.kmeans_stream(
        y, 8, init=y[:8], max_iter=3, metric="cosine", device="cpu", progress=False
    )
    own = parts.centroids.double()[parts.labels.long()]
    exact = float((1 - torch.cosine_similarity(y.double(), own, dim=-1)).sum())
    assert parts.inertia == pytest.approx(exact, rel=1e-3)
    whole = fk.kmeans(y, 8, init=y[:8], max_iter=3, metric="cosine")
    assert parts.inertia == pytest.approx(float(whole.inertia), rel=1e-3)


def test_kmeans_stream_of_points_with_an_offset() -> None:
    x = (torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)).double() + 1e6).float()
    parts = fk.kmeans_stream(
        x, 5, init=x[:5], max_iter=4, chunk_rows=300, device="cpu", progress=False
    )
    own = parts.centroids.double()[parts.labels.long()]
    exact = float((x.double() - own).square().sum())
    assert parts.inertia == pytest.approx(exact, rel=1e-5)
    for k in range(5):
        mean = x.double()[parts.labels == k].mean(0)
        assert ((parts.centroids[k] - mean).abs() <= 0.0625).all()  # a rounding at a million


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_kmeans_stream_refuses_bad_weights(bad: float) -> None:
    weight = np.ones(20)
    weight[4] = bad
    with pytest.raises(ValueError, match="sample_weight must hold finite weights"):
        fk.kmeans_stream(np.ones((20, 2)), 2, sample_weight=weight, progress=False)


def _whole(metric: str, device: str) -> dict[str, fk.KMeansResult]:
    """Cluster in one process what two members share."""
    x = blobs(1, 500, 6, 5)[0].to(device)
    weight = (torch.arange(500) % 4 + 0.5).to(device)
    tol = 1e-6 if metric == "euclidean" else 0.0
    source = torch.Generator().manual_seed(3)
    return {
        "given": fk.kmeans(x, 5, init=x[:5], metric=metric, max_iter=4, sample_weight=weight),
        "drawn": fk.kmeans(x, 5, metric=metric, max_iter=50, tol=tol, generator=source),
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("metric", METRICS)
def test_kmeans_distributed_over_two_processes_equals_one(
    metric: str, device: str, tmp_path: Path
) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL wants a GPU per process, and there is one")
    results = tmp_path / "result"
    mp.spawn(member, args=(2, str(tmp_path / "meet"), metric, str(results), device), nprocs=2)
    one, two = (torch.load(f"{results}.{rank}", map_location="cpu") for rank in range(2))
    for name, expected in _whole(metric, device).items():
        assert torch.equal(one[name]["centroids"], two[name]["centroids"])
        labels = torch.cat([one[name]["labels"], two[name]["labels"]])
        assert torch.equal(labels, expected.labels.cpu())
        assert torch.equal(one[name]["sizes"], expected.sizes.cpu())
        assert one[name]["n_iter"] == expected.n_iter
        torch.testing.assert_close(one[name]["centroids"], expected.centroids.cpu())
        torch.testing.assert_close(one[name]["inertia"], expected.inertia.cpu())
        by_label = two[name]["labels"].sort(stable=True).indices
        assert torch.equal(two[name]["order"], by_label.int())


def test_kmeans_distributed_refuses_bad_values_on_every_process(tmp_path: Path) -> None:
    results = tmp_path / "said"
    mp.spawn(refused_member, args=(2, str(tmp_path / "meet"), str(results)), nprocs=2)
    one, two = (torch.load(f"{results}.{rank}") for rank in range(2))
    assert one["weights"] == "sample_weight of process 1 is not finite or is negative"
    assert two["weights"].startswith("sample_weight must hold finite weights of at least 0")
    assert one["points"] == two["points"]
    assert "must be finite on every process" in one["points"]
