"""Clustering the queries or keys of a call, warm-started from the step before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_kmeans import kmeans


@dataclass(frozen=True, kw_only=True, eq=False)
class Clusters:
    """Clusters of the video rows of each head; `K` of them, similar ones next to each other.

    Attributes:
        labels: int32 `[B, H, N]`.
        centroids: `[B, H, K, D]`, mean row of each cluster, finite; one that is empty, or holds a
            row that is not finite, keeps its last.
        sizes: int32 `[B, H, K]`.
        order: int32 `[B, H, N]`, rows sorted by cluster.
        broken: bool `[B, H]`, heads of which some row is not finite, or so large that its square
            is not.
    """

    labels: Tensor
    centroids: Tensor
    sizes: Tensor
    order: Tensor
    broken: Tensor


def cluster_rows(
    x: Tensor,
    n_clusters: int,
    *,
    remembered: Tensor | None,
    iterations: tuple[int, int],
    generator: torch.Generator | None,
) -> Clusters:
    """Cluster the rows of each head.

    Without remembered centroids it starts from random rows: the same row numbers for every head and
    batch item, so that a result depends neither on what else is in the batch nor on which heads are
    on this device. Before the last rounds of a first call the centroids are put in an order in
    which similar ones are neighbours; they keep it from then on, so rows sorted by label are in
    that order too.

    NaN and infinity do no harm beyond their own cluster, which stays where it was; their head is
    marked `broken`.

    Args:
        x: `[B, H, N, D]`.
        n_clusters: clusters per head, at most `N`.
        remembered: `[B, H, K, D]` from an earlier step; ignored if it does not fit `x`.
        iterations: rounds of a first call, and of a later call.
        generator: source of the random start.
    """
    batch, heads, rows, width = x.shape
    shape = (batch, heads, n_clusters, width)
    broken = None
    if x.device.type == "cpu":
        # K-means on a CPU refuses such rows; on a GPU it would have to wait to see them, so there
        # they show in the inertia only.
        finite = x.isfinite()
        broken = ~finite.flatten(2).all(dim=-1)
        x = torch.where(finite, x, 0)
    flat = x.reshape(batch * heads, rows, width)
    if fits(remembered, shape, x) and remembered is not None:
        start = remembered
        rounds = iterations[1]
    else:
        drawn = torch.rand(rows, generator=generator, device=x.device)
        chosen = drawn.argsort()[:n_clusters]
        start = zero_where_not_finite(x.index_select(2, chosen))
        rounds = min(iterations)
        if iterations[0] > rounds:
            result = kmeans(
                flat,
                n_clusters,
                init=start.reshape(-1, n_clusters, width),
                max_iter=iterations[0] - rounds,
            )
            start = result.centroids.view(shape)
        start = start.gather(2, neighbour_order(start)[..., None].expand(shape))
    result = kmeans(flat, n_clusters, init=start.reshape(-1, n_clusters, width), max_iter=rounds)
    endless = ~result.inertia.view(batch, heads).isfinite()
    return Clusters(
        labels=result.labels.view(batch, heads, rows),
        centroids=result.centroids.view(shape),
        sizes=result.sizes.view(batch, heads, n_clusters),
        order=result.order.view(batch, heads, rows),
        broken=endless if broken is None else broken | endless,
    )


def zero_where_not_finite(x: Tensor) -> Tensor:
    """Return `x` with 0 for NaN and infinity."""
    return torch.where(x.isfinite(), x, 0)


def fits(remembered: Tensor | None, shape: tuple[int, ...], like: Tensor) -> bool:
    """Return whether remembered centroids can start a clustering of rows like `like`."""
    return (
        remembered is not None
        and tuple(remembered.shape) == shape
        and remembered.dtype == like.dtype
        and remembered.device == like.device
    )


def neighbour_order(centroids: Tensor, *, rounds: int = 8) -> Tensor:
    """Order centroids so that similar ones are neighbours.

    Sorts them along their principal direction, cuts the list in halves, and does the same within
    each half, down to pairs; a half's direction is turned to agree with that of the whole. What is
    not finite counts as 0, so the result is a permutation whatever the centroids hold.

    Args:
        centroids: `[B, H, K, D]`.
        rounds: power iterations that find a direction.

    Returns:
        int64 `[B, H, K]`, a permutation for each head.
    """
    batch, heads, count, _ = centroids.shape
    padded = 1 << max(count - 1, 1).bit_length()
    rows = zero_where_not_finite(centroids.float())
    # Scaled by a power of two, which rounds nothing, so that no square or product overflows.
    exponent = rows.abs().amax(dim=(-1, -2), keepdim=True).frexp().exponent
    rows = torch.nn.functional.pad(rows.ldexp(-exponent), (0, 0, 0, padded - count))
    order = torch.arange(padded, device=centroids.device).expand(batch, heads, padded)
    parent = None
    width = padded
    while width > 1:
        groups = order.unflatten(2, (-1, width))
        # Rows of padding have no weight and sort to the end.
        real = groups < count
        points = rows.gather(2, order[..., None].expand_as(rows)).unflatten(2, (-1, width))
        weight = real.float()[..., None]
        mean = (points * weight).sum(dim=3, keepdim=True) / weight.sum(dim=3, keepdim=True).clamp(1)
        direction = principal_direction((points - mean) * weight, rounds)
        if parent is not None:
            agrees = (direction * parent).sum(dim=-1, keepdim=True) >= 0
            direction = torch.where(agrees, direction, -direction)
        place = (points * direction[..., None, :]).sum(dim=-1).masked_fill(~real, torch.inf)
        inner = place.argsort(dim=-1, stable=True)
        order = groups.gather(-1, inner).flatten(2)
        parent = direction.repeat_interleave(2, dim=2)
        width //= 2
    return order[..., :count]


def principal_direction(points: Tensor, rounds: int) -> Tensor:
    """Return the direction in which centred points `[..., N, D]` vary most, `[..., D]`."""
    farthest = points.square().sum(dim=-1).argmax(dim=-1)[..., None, None]
    direction = points.gather(-2, farthest.expand(*points.shape[:-2], 1, points.shape[-1]))
    for _ in range(rounds):
        direction = (direction @ points.transpose(-1, -2)) @ points
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return direction.squeeze(-2)
