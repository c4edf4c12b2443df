"""K-means over rows that the processes of a ring hold parts of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_kmeans import assign, update
from svg_attention.planning.clustering import (
    Clusters,
    fits,
    neighbour_order,
    zero_where_not_finite,
)
from svg_attention.ring.exchange import Ring


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedClusters:
    """Clusters of the rows of all processes.

    Attributes:
        here: of the rows of this process; centroids and `broken` are those of all rows.
        sizes: int32 `[B, H, K]`, rows of all processes.
        shares: int32 `[size, B, H, K]`, rows of each process.
    """

    here: Clusters
    sizes: Tensor
    shares: Tensor


def cluster_shared_rows(
    x: Tensor,
    n_clusters: int,
    *,
    ring: Ring,
    counts: tuple[int, ...],
    remembered: Tensor | None,
    iterations: tuple[int, int],
    generator: torch.Generator | None,
) -> SharedClusters:
    """Cluster the rows of each head, of which every process holds a share.

    In each round every process labels its own rows, and one all-reduce of `K * (D + 1)` numbers a
    head adds up what they found. It is the clustering that `cluster_rows` finds for all rows on one
    device, up to the rounding of sums: the random start takes the same rows, the order of clusters
    is made of the same centroids.

    Args:
        x: `[B, H, N_rank, D]`.
        n_clusters: clusters per head, at most the rows of all processes.
        ring: the processes.
        counts: rows of each process.
        remembered: see `cluster_rows`.
        iterations: see `cluster_rows`.
        generator: source of the random start, in the same state on every process.
    """
    batch, heads, _, width = x.shape
    shape = (batch, heads, n_clusters, width)
    broken = ring.any(~x.sum(dim=(2, 3), dtype=torch.float32).isfinite())
    if x.device.type == "cpu":
        x = zero_where_not_finite(x)  # which k-means on a CPU refuses
    if fits(remembered, shape, x) and remembered is not None:
        centroids, rounds = remembered, iterations[1]
    else:
        rows = torch.rand(sum(counts), generator=generator, device=x.device)
        centroids = _rows_of_all(x, rows.argsort()[:n_clusters], ring, counts)
        rounds = min(iterations)
        for _ in range(iterations[0] - rounds):
            _, centroids = _round(x, centroids, ring)
        order = neighbour_order(centroids)[..., None].expand(shape)
        # Nothing may depend on whether two devices order alike.
        centroids = ring.from_first(centroids.gather(2, order))
    for _ in range(rounds):
        here, centroids = _round(x, centroids, ring)
    labels, sizes, order = here
    shares = ring.gather(sizes)
    return SharedClusters(
        here=Clusters(labels=labels, centroids=centroids, sizes=sizes, order=order, broken=broken),
        sizes=shares.sum(dim=0, dtype=torch.int32),
        shares=shares,
    )


def mean_of_shares(x: Tensor, clusters: SharedClusters, ring: Ring) -> Tensor:
    """Return the mean row of each cluster over all processes, `[B, H, K, D]`; 0 for an empty one.

    Args:
        x: `[B, H, N_rank, D]`, rows that the clusters' labels are of.
        clusters: the clusters.
        ring: the processes.
    """
    count = clusters.sizes.shape[-1]
    zeros = x.new_zeros(*x.shape[:2], count, x.shape[3])
    means, sizes, _ = _means(x, clusters.here.labels, zeros)
    sums = ring.sum(means.float() * sizes[..., None])
    return (sums / clusters.sizes.clamp(min=1)[..., None]).to(x.dtype)


def _round(
    x: Tensor, centroids: Tensor, ring: Ring
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return labels, sizes and order of the rows here, and the centroids of all rows."""
    batch, heads, rows, width = x.shape
    flat = x.reshape(batch * heads, rows, width)
    labels = assign(flat, centroids.reshape(batch * heads, -1, width)).view(batch, heads, rows)
    means, sizes, order = _means(x, labels, centroids)
    weight = sizes.float()[..., None]
    total = ring.sum(torch.cat([means.float() * weight, weight], dim=-1))
    found = total[..., :-1] / total[..., -1:]
    alive = (total[..., -1:] > 0) & found.isfinite().all(dim=-1, keepdim=True)
    return (labels, sizes, order), torch.where(alive, found.to(x.dtype), centroids)


def _means(x: Tensor, labels: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean row of each cluster here, sizes, and the order that sorts the rows."""
    batch, heads, rows, width = x.shape
    count = previous.shape[2]
    result = update(
        x.reshape(batch * heads, rows, width),
        labels.reshape(batch * heads, rows),
        count,
        previous=previous.reshape(batch * heads, count, width),
    )
    return (
        result.centroids.view(batch, heads, count, width),
        result.sizes.view(batch, heads, count),
        result.order.view(batch, heads, rows),
    )


def _rows_of_all(x: Tensor, chosen: Tensor, ring: Ring, counts: tuple[int, ...]) -> Tensor:
    """Return rows `[B, H, K, D]` by their numbers over all processes, 0 for what is not finite."""
    local = chosen - sum(counts[: ring.rank])
    mine = (local >= 0) & (local < counts[ring.rank])
    rows = x.index_select(2, local.clamp(0, max(counts[ring.rank] - 1, 0)))
    rows = zero_where_not_finite(rows).float() * mine[:, None]
    return ring.sum(rows).to(x.dtype)
