from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from svg_attention import TokenLayout
from svg_attention.methods.base import AttentionCall
from svg_attention.planning.clustering import Clusters, cluster_rows, fits, neighbour_order


def cluster(
    x: Tensor, count: int = 12, remembered: Tensor | None = None, seed: int = 3
) -> Clusters:
    return cluster_rows(
        x,
        count,
        remembered=remembered,
        iterations=(10, 2),
        generator=torch.Generator().manual_seed(seed),
    )


def cost(x: Tensor, clusters: Clusters) -> float:
    index = clusters.labels.long()[..., None].expand_as(x)
    return float((x - clusters.centroids.gather(2, index)).square().sum())


def test_cluster_rows_returns_fields_that_belong_together() -> None:
    x = torch.randn(2, 3, 200, 8)
    found = cluster(x)
    for b in range(2):
        for h in range(3):
            labels = found.labels[b, h].long()
            assert torch.equal(torch.bincount(labels, minlength=12), found.sizes[b, h].long())
            order = found.order[b, h].long()
            assert torch.equal(order.sort().values, torch.arange(200))
            assert (labels[order].diff() >= 0).all()
            for c in range(12):
                if found.sizes[b, h, c]:
                    mean = x[b, h, labels == c].mean(dim=0)
                    assert torch.allclose(found.centroids[b, h, c], mean, atol=1e-5)


def test_cluster_rows_never_cost_more_from_a_warm_start() -> None:
    x = torch.randn(1, 2, 300, 8)
    found = cluster(x)
    for _ in range(3):
        later = cluster(x, remembered=found.centroids)
        assert cost(x, later) <= cost(x, found) * (1 + 1e-6)
        found = later


def test_cluster_rows_of_a_batch_item_are_as_if_alone() -> None:
    x = torch.randn(2, 2, 150, 8)
    both, alone = cluster(x), cluster(x[1:])
    assert torch.equal(both.labels[1:], alone.labels)
    assert torch.equal(both.centroids[1:], alone.centroids)


@pytest.mark.parametrize(
    "other", [torch.zeros(1, 2, 12, 9), torch.zeros(2, 2, 12, 8), torch.zeros(1, 2, 12, 8).half()]
)
def test_fits_refuses_memories_of_another_kind(other: Tensor) -> None:
    x = torch.randn(1, 2, 150, 8)
    assert not fits(other, (1, 2, 12, 8), x)
    assert torch.equal(cluster(x, remembered=other).labels, cluster(x).labels)


def test_cluster_rows_into_as_many_clusters_as_rows_and_into_one() -> None:
    x = torch.randn(1, 1, 20, 4)
    assert torch.equal(cluster(x, 20).sizes, torch.ones(1, 1, 20, dtype=torch.int32))
    assert cluster(x, 1).sizes.item() == 20


def test_neighbour_order_is_a_permutation_that_follows_a_line() -> None:
    line = torch.randperm(30, generator=torch.Generator().manual_seed(0)).float()
    direction = torch.randn(16)
    centroids = line[:, None] * direction + 0.01 * torch.randn(30, 16)
    order = neighbour_order(centroids[None, None])[0, 0]
    steps = line[order].diff()
    assert (steps == 1).all() or (steps == -1).all()


def test_neighbour_order_survives_equal_centroids() -> None:
    order = neighbour_order(torch.ones(1, 2, 5, 3))
    assert torch.equal(order, torch.arange(5).expand(1, 2, 5))


@pytest.mark.parametrize("text_position", ["first", "last"])
@pytest.mark.parametrize("heads_apart", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_video_rows_beside_text_lie_as_the_copy_engine_wants_them(
    batch: int, heads_apart: bool, text_position: Literal["first", "last"]
) -> None:
    """Hold what k-means is given to be one matrix, which its kernel for Hopper asks for.

    Heads lie apart, or side by side in the rows of tokens as a projection leaves them.
    """
    assigner = pytest.importorskip("flash_kmeans.triton.assigner")
    layout = TokenLayout(grid=(2, 4, 4), text_tokens=7, text_position=text_position)
    x = torch.randn(batch, 3, layout.tokens, 8)
    if not heads_apart:
        x = torch.randn(batch, layout.tokens, 3, 8).transpose(1, 2)
    rows = AttentionCall(query=x, key=x, value=x, layout=layout).video(x)
    flat = rows.reshape(batch * 3, *rows.shape[2:])
    assert assigner.sheet(flat) is not None
    if batch == 1 or heads_apart:
        assert flat.data_ptr() == x.data_ptr() + x.stride(2) * 4 * layout.video_start, "no copy"
