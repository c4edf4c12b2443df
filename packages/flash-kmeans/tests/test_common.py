"""The mathematics that backends share."""

from __future__ import annotations

import pytest
import torch
from kmeans_oracles import blobs, regret

from flash_kmeans import common, reference

METRICS = ("euclidean", "cosine", "dot")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_point_costs_keep_their_digits_at_small_angles(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 500, 32, generator=source) * 0.5 + 100).to(dtype)
    labels = (torch.arange(500, dtype=torch.int32) % 8)[None]
    centroids = x[:, :8].clone()
    own = centroids.double().gather(1, labels.long()[..., None].expand(-1, -1, 32))
    expected = 1 - torch.cosine_similarity(x.double(), own, dim=-1)
    costs = common.point_costs(x, centroids, labels, "cosine")
    assert (costs >= 0).all()
    torch.testing.assert_close(costs.double(), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_distances_square_to_point_costs(metric: str) -> None:
    x = blobs(1, 60, 5, 4)[0] + 1e4
    x[7] = 0
    centroids = x[:6].clone()
    centroids[0] += 1
    apart = common.distances(x, centroids, metric)
    for k in range(6):
        labels = torch.full((1, 60), k, dtype=torch.int32)
        costs = common.point_costs(x[None], centroids[None], labels, metric)[0]
        distance = apart[:, k].square() if metric == "euclidean" else apart[:, k]
        torch.testing.assert_close(distance, costs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_scoring_lets_a_bad_centroid_attract_nothing(metric: str, bad: float) -> None:
    x = blobs(2, 50, 6, 5)
    centroids = blobs(2, 7, 6, 5, seed=1)
    rest = [0, 1, 2, 4, 5, 6]
    expected = torch.tensor(rest)[reference.assign(x, centroids[:, rest], metric).long()]
    centroids[1, 3, 2] = bad
    labels = reference.assign(x, centroids, metric)
    if bad == 1e30 and metric != "euclidean":  # a direction like any other
        assert ((labels >= 0) & (labels < 7)).all()
        return
    assert torch.equal(labels[1], expected[1].int())
    assert (regret(x[:1], centroids[:1], labels[:1], metric) < 1e-5).all()


def test_origin_stays_amid_the_centroids() -> None:
    c = torch.randn(2, 70, 3, generator=torch.Generator().manual_seed(0)) + 1e6
    c[0, ::3] = torch.nan
    c[1, ::3] = 1e30
    assert ((common.origin(c) - 1e6).abs() < 3).all()
    assert torch.equal(common.origin(torch.full((1, 3, 2), torch.nan)), torch.zeros(1, 1, 2))


@pytest.mark.parametrize("metric", METRICS)
def test_finalize_keeps_centroids_without_weight_or_finite_sum(metric: str) -> None:
    sums = torch.ones(1, 4, 2, dtype=torch.float64)
    sums[0, 1] = 0
    sums[0, 2, 0] = torch.inf
    sums[0, 3, 1] = torch.nan
    previous = torch.tensor([[[5.0, 5.0]]]).expand(1, 4, 2)
    totals = torch.tensor([[2.0, 0.0, 2.0, 2.0]])
    out = common.finalize(sums, totals, previous, metric)
    assert torch.equal(out[0, 1:], previous[0, 1:])
    assert torch.isfinite(out).all()
    assert (out[0, 0] < 1).all()


def test_relabel_farthest_takes_no_point_without_weight_nor_one_that_is_not_finite() -> None:
    x = torch.tensor([[0.0, 1.0, 100.0, torch.nan, 2.0]]).unsqueeze(-1)
    weight = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]])
    centroids = torch.tensor([[[0.0], [100.0], [500.0]]])
    labels = torch.tensor([[0, 0, 1, 0, 0]], dtype=torch.int32)
    out = common.relabel_farthest(x, labels, centroids, "euclidean", weight)
    # Cluster 1 holds a point of weight zero alone, so it is as empty as cluster 2.
    assert out.tolist() == [[0, 2, 1, 0, 1]]


def test_relabel_farthest_empties_no_cluster_even_with_fewer_points_than_clusters() -> None:
    x = torch.tensor([[[5.0], [5.0], [9.0], [9.5]]])
    labels = torch.tensor([[0, 0, 1, 1]], dtype=torch.int32)
    centroids = torch.tensor([[[0.0], [9.0], [50.0], [60.0], [70.0]]])
    out = common.relabel_farthest(x, labels, centroids, "euclidean", None)
    assert out.tolist() == [[0, 2, 1, 3]]


def test_mean_variance_of_points_with_an_offset() -> None:
    x = torch.randn(1, 100_000, 3, generator=torch.Generator().manual_seed(0)) + 1e4
    expected = x.double().var(1, correction=0).mean(-1)
    torch.testing.assert_close(common.mean_variance(x).double(), expected, rtol=1e-4, atol=0)
