"""Starting centroids."""

from __future__ import annotations

import pytest
import torch
from kmeans_oracles import blobs

import flash_kmeans as fk
from flash_kmeans import seeding


def cost(x: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(torch.cdist(x.double(), centroids.double()).amin(-1).square().sum())


def test_plus_plus_starts_as_well_as_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    ours, theirs = 0.0, 0.0
    for seed in range(12):
        x = blobs(1, 400, 2, 12, seed=seed)
        start = seeding.plus_plus(x, 12, "euclidean", torch.Generator().manual_seed(seed))
        ours += cost(x[0], start[0])
        found, _ = cluster.kmeans_plusplus(x[0].numpy(), 12, random_state=seed)
        theirs += cost(x[0], torch.from_numpy(found))
    assert ours < 1.05 * theirs
    assert ours > 0.9 * theirs  # greedier than this would be another algorithm


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_plus_plus_picks_distinct_points_of_the_batch(metric: str) -> None:
    x = blobs(2, 30, 3, 4, dtype=torch.float16)
    start = seeding.plus_plus(x, 30, metric, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    for b in range(2):
        assert sorted(map(tuple, start[b].tolist())) == sorted(map(tuple, x[b].tolist()))


def test_plus_plus_finds_every_blob_far_from_the_origin() -> None:
    source = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]]) + 1e6
    x = centres.repeat_interleave(30, 0) + torch.randn(120, 2, generator=source)
    for seed in range(10):
        start = seeding.plus_plus(x[None], 4, "euclidean", torch.Generator().manual_seed(seed))
        assert (
            torch.cdist(start[0] - 1e6, centres - 1e6).argmin(1).sort().values == torch.arange(4)
        ).all()


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_kmeans_draws_no_point_of_weight_zero_while_others_last(init: str) -> None:
    x = torch.cat([torch.zeros(5, 1), torch.arange(1.0, 6.0)[:, None]])
    weight = torch.cat([torch.zeros(5), torch.ones(5)])
    for seed in range(5):
        source = torch.Generator().manual_seed(seed)
        result = fk.kmeans(x, 5, init=init, sample_weight=weight, max_iter=1, generator=source)
        assert result.centroids[:, 0].sort().values.tolist() == [1, 2, 3, 4, 5]
    # Seven clusters need two more points: whichever, but distinct ones.
    more = seeding.plus_plus(x[None], 7, "euclidean", None, weight[None])
    assert (more[0, :, 0] > 0).sum() == 5


def test_plus_plus_of_equal_points() -> None:
    x = torch.ones(1, 6, 2)
    assert torch.equal(seeding.plus_plus(x, 4, "cosine", None), torch.ones(1, 4, 2))
