"""Points in chunks and over processes give what all points at once give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from kmeans_member import member
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
    for rows in (1000, 333, 1):
        if rows == 1 and metric != "euclidean":
            continue
        parts = fk.kmeans_stream(x, 6, chunk_rows=rows, device="cpu", progress=False, **arguments)
        assert torch.equal(parts.labels, whole.labels)
        assert torch.equal(parts.sizes.int(), whole.sizes)
        torch.testing.assert_close(parts.centroids, whole.centroids)
        assert parts.inertia == pytest.approx(float(whole.inertia), rel=1e-5)


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
    with pytest.raises(ValueError, match="random"):
        fk.kmeans_stream(x, 3, init="k-means++", device="cpu")
    with pytest.raises(ValueError, match="source"):
        fk.kmeans_stream(x[None], 3, device="cpu")


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
