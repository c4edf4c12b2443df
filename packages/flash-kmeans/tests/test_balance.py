"""A bound on the sizes of clusters."""

from __future__ import annotations

import pytest
import torch
from kmeans_oracles import blobs, means

import flash_kmeans as fk
from flash_kmeans import balance


def crowded(n: int = 1000) -> torch.Tensor:
    """Return two batches of points of which ten dense places hold 99 %."""
    source = torch.Generator().manual_seed(0)
    places = torch.randn(2, 10, 4, generator=source) * 20
    x = places.repeat(1, n // 10, 1) + 0.1 * torch.randn(2, n, 4, generator=source)
    x[:, :: n // 10] = torch.randn(2, 10, 4, generator=source) * 100
    return x


@pytest.mark.parametrize("ratio", [1.0, 1.5, 4])
@pytest.mark.parametrize("empty", ["keep", "farthest"])
def test_kmeans_with_a_bound_on_sizes(ratio: float, empty: str) -> None:
    x = crowded()
    start = torch.Generator().manual_seed(1)
    plain = fk.kmeans(x, 50, max_iter=8, generator=start)
    assert (plain.sizes.max(1).values > 80).all()
    result = fk.kmeans(
        x, 50, max_iter=8, max_size_ratio=ratio, empty=empty, generator=start.manual_seed(1)
    )
    assert int(result.sizes.max()) <= 20 * ratio
    counts = torch.stack([torch.bincount(row, minlength=50) for row in result.labels])
    assert torch.equal(result.sizes, counts.int())
    expected = means(x, result.labels, result.centroids)
    torch.testing.assert_close(result.centroids.double(), expected, rtol=1e-5, atol=1e-4)


def test_kmeans_with_a_bound_that_nothing_reaches_is_kmeans() -> None:
    x = blobs(2, 200, 4, 5)
    plain, bounded = (
        fk.kmeans(x, 5, init=x[:, :5], max_iter=4, max_size_ratio=r) for r in (None, 5.0)
    )
    assert torch.equal(plain.labels, bounded.labels)
    assert torch.equal(plain.centroids, bounded.centroids)


def test_bounded_labels_move_only_the_points_without_room() -> None:
    x = torch.tensor([[[0.0], [0.1], [0.2], [5.0]]])
    centroids = torch.tensor([[[0.0], [1.0], [5.0]]])
    labels = torch.tensor([[0, 0, 0, 2]], dtype=torch.int32)
    out = balance.bounded_labels(x, labels, centroids, "euclidean", 2, "reference")
    assert out.tolist() == [[0, 0, 1, 2]]
    assert labels.tolist() == [[0, 0, 0, 2]]


@pytest.mark.parametrize(
    ("points", "clusters", "ratio", "expected"),
    [(10, 3, 1.0, 4), (9, 3, 1.0, 3), (10, 3, 1.5, 5), (1, 1, 1.0, 1)],
)
def test_largest_size_leaves_room_for_all(
    points: int, clusters: int, ratio: float, expected: int
) -> None:
    assert balance.largest_size(points, clusters, ratio) == expected
