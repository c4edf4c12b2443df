"""Mathematics that backends share: scores, costs, sorting by label, centroids from sums.

Data with a common offset (coordinates in metres, keys of an attention layer) must not lose the
differences that tell clusters apart. Three rules keep them, on every backend:

- Squares of differences are never expanded into squares of what differs.
- Scores are measured from an origin amid the centroids, wherever points have more digits than a
  product keeps (fp32, fp64). 16-bit points carry no offset that fp32 products would feel.
- Sums are accumulated in the next wider type: 16-bit points in fp32, fp32 points in fp64.

What is not finite stays where it is: a centroid that is not finite attracts no point, and one whose
sum is not finite keeps its place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Metric

# Values held at once: small enough for a CPU's cache, large enough to fill a GPU.
VALUES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}
# Centroids looked at to find an origin: the median of so many is near enough.
_MOST_LOOKED_AT = 32


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of scores and costs: fp64 for fp64 points, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which points are summed: fp32 for 16-bit points, else fp64."""
    return torch.float32 if x.element_size() == 2 else torch.float64


def spans(total: int, per_item: int, device: torch.device) -> Iterator[slice]:
    """Cut `total` items of `per_item` values each into slices that fit the device's scratch."""
    step = max(1, VALUES_AT_ONCE.get(device.type, VALUES_AT_ONCE["cuda"]) // max(1, per_item))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def inverse_norms(x: Tensor) -> Tensor:
    """Return `1 / |x|` per point, `[B, N]`, and zero for a point too short to have a direction."""
    out = torch.empty(x.shape[:2], dtype=compute_dtype(x), device=x.device)
    for part in spans(x.shape[1], x.shape[0] * x.shape[2], x.device):
        inverse = 1 / x[:, part].to(out.dtype).norm(dim=-1)
        out[:, part] = torch.where(torch.isinf(inverse), 0, inverse)
    return out


def point_weights(
    x: Tensor, metric: Metric, weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return by what points are scaled and weighted before they are summed, `[B, N]` each.

    "cosine" scales points to unit length; a point of length zero has no direction and no weight.
    """
    if metric != "cosine":
        return None, weight
    scale = inverse_norms(x)
    alive = (scale > 0).to(scale.dtype)
    return scale, alive if weight is None else alive * weight


def origin(centroids: Tensor) -> Tensor:
    """Return a point `[B, 1, D]` amid the centroids: the median of some, feature by feature.

    Unlike a mean it stays amid them where a few are far away or not finite.
    """
    some = centroids[:, :: max(1, centroids.shape[1] // _MOST_LOOKED_AT)]
    median = some.sort(dim=1).values[:, (some.shape[1] - 1) // 2, None]
    return torch.where(torch.isfinite(median), median, 0)


def scoring(
    centroids: Tensor, metric: Metric, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return directions `[B, K, D]`, biases `[B, K]` and an origin `[B, 1, D]` or None.

    The best centroid of `x` has the highest `(x - origin) . direction + bias`; None is zero. Adding
    the same to every score of a point changes no comparison: that is what lets "euclidean" measure
    from the origin, and lets all metrics take the origin off the directions.
    """
    c = centroids.to(dtype)
    if metric == "cosine":
        c = F.normalize(c, dim=-1)
    middle = origin(c)
    directions = c - middle
    bias = directions.square().sum(-1).mul_(-0.5)
    if metric == "euclidean":
        alive = torch.isfinite(bias)
    else:
        alive, bias = torch.isfinite(directions).all(-1), torch.zeros_like(bias)
    bias = torch.where(alive, bias, -torch.inf)
    directions = torch.where(alive.unsqueeze(-1), directions, 0)
    return directions, bias, middle if metric == "euclidean" else None


def sort_by_label(labels: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Return the stable order int32 `[B, N]` of points by label, and sizes int32 `[B, K]`."""
    if labels.device.type == "cpu" and n_clusters < 1 << 15:
        # 16-bit keys get a radix sort, six times quicker than torch's.
        keys = labels.to(torch.int16).numpy()
        order = torch.from_numpy(keys.argsort(axis=1, kind="stable"))
    else:
        order = torch.sort(labels, dim=1, stable=True).indices
    sizes = torch.zeros(labels.shape[0], n_clusters, dtype=torch.int32, device=labels.device)
    ones = torch.ones((), dtype=torch.int32, device=labels.device).expand(labels.shape)
    sizes.scatter_add_(1, labels.long(), ones)
    return order.to(torch.int32), sizes


def finalize(sums: Tensor, totals: Tensor, previous: Tensor, metric: Metric) -> Tensor:
    """Return centroids in the dtype of `previous` from sums `[B, K, D]` and weights `[B, K]`.

    One without weight keeps its own, and so does one whose sum is not finite.
    """
    divisor = sums.norm(dim=-1) if metric == "cosine" else totals
    means = sums / divisor.unsqueeze(-1)
    alive = (divisor > 0) & torch.isfinite(means).all(-1)
    return torch.where(alive.unsqueeze(-1), means.to(previous.dtype), previous)


def point_costs(x: Tensor, centroids: Tensor, labels: Tensor, metric: Metric) -> Tensor:
    """Return each point's part of the objective `[B, N]` for its own centroid.

    `|x - c|^2`, `1 - cos(x, c)` or `-x.c`. The cosine is taken as half the squared distance of unit
    vectors, which keeps its digits where the angle is small; that of a zero point is zero.
    """
    batch, n_points, dim = x.shape
    n_clusters = centroids.shape[1]
    dtype = compute_dtype(x)
    rows = centroids.reshape(batch * n_clusters, dim).to(dtype)
    scale = None
    if metric == "cosine":
        rows, scale = F.normalize(rows, dim=-1), inverse_norms(x)
    base = torch.arange(batch, device=x.device).unsqueeze(1) * n_clusters
    out = torch.empty(batch, n_points, dtype=dtype, device=x.device)
    for b in spans(batch, min(n_points, 64) * dim, x.device):
        for n in spans(n_points, (b.stop - b.start) * dim, x.device):
            pick = (labels[b, n].long() + base[b]).reshape(-1)
            values = x[b, n].to(dtype)
            own = rows.index_select(0, pick).view(values.shape)
            if scale is not None:
                values = values * scale[b, n, None]
            if metric == "dot":
                out[b, n] = -(values * own).sum(-1)
            else:
                out[b, n] = torch.linalg.vector_norm(own.sub_(values), dim=-1).square_()
    return out if scale is None else out.mul_(0.5).masked_fill_(scale == 0, 1)


def inertia(
    x: Tensor, centroids: Tensor, labels: Tensor, metric: Metric, weight: Tensor | None
) -> Tensor:
    """Return the objective `[B]`: the (weighted) sum of `point_costs`."""
    costs = point_costs(x, centroids, labels, metric)
    total = (costs if weight is None else costs * weight).sum(-1, dtype=torch.float64)
    return total.to(costs.dtype)


def distances(x: Tensor, centroids: Tensor, metric: Metric) -> Tensor:
    """Return how far points `[N, D]` are from all centroids, `[N, K]`, in the compute dtype of `x`.

    `|x - c|`, `1 - cos(x, c)` or `-x.c`, as in `point_costs`.
    """
    dtype = compute_dtype(x)
    rows, means = x.to(dtype), centroids.to(dtype)
    if metric == "dot":
        return -(rows @ means.T)
    scale = inverse_norms(x[None])[0].unsqueeze(-1)
    if metric == "cosine":
        rows, means = rows * scale, F.normalize(means, dim=-1)
    # torch's other modes expand the square.
    apart = torch.cdist(rows, means, compute_mode="donot_use_mm_for_euclid_dist")
    return apart if metric == "euclidean" else apart.square_().mul_(0.5).masked_fill_(scale == 0, 1)


def mean_variance(x: Tensor) -> Tensor:
    """Return the variance of each feature averaged over features, `[B]`."""
    batch, n_points, dim = x.shape
    dtype = compute_dtype(x)
    parts = list(spans(n_points, batch * dim, x.device))
    total = torch.stack([x[:, p].sum(1, dtype=torch.float64) for p in parts]).sum(0)
    mean = (total / n_points).unsqueeze(1).to(dtype)
    squares = [(x[:, p].to(dtype) - mean).square_().sum((1, 2)) for p in parts]
    return torch.stack(squares).sum(0) / (n_points * dim)


def relabel_farthest(
    x: Tensor, labels: Tensor, centroids: Tensor, metric: Metric, weight: Tensor | None
) -> Tensor:
    """Return labels that give each empty cluster one point: those farthest from their centroids.

    A cluster is empty if no finite point of positive weight carries its label; other points are
    never taken either. Nor is the nearest point of a cluster, which would be empty then. Nothing
    synchronises.
    """
    n_points, n_clusters = x.shape[1], centroids.shape[1]
    index = labels.long()
    _, mass = point_weights(x, metric, weight)
    costs = point_costs(x, centroids, labels, metric)
    counted = torch.isfinite(costs) if mass is None else torch.isfinite(costs) & (mass > 0)
    costs = torch.where(counted, costs, torch.inf)
    empty = index.new_zeros(centroids.shape[:2]).scatter_add_(1, index, counted.long()) == 0
    lowest = costs.new_full(empty.shape, torch.inf).scatter_reduce_(1, index, costs, "amin")
    place = torch.arange(n_points, device=x.device).expand_as(index)
    nearest = torch.where(costs == lowest.gather(1, index), place, n_points)
    first = index.new_full(empty.shape, n_points).scatter_reduce_(1, index, nearest, "amin")
    stays = torch.isinf(costs) | (place == first.gather(1, index))
    best = costs.masked_fill(stays, -torch.inf).topk(min(n_clusters, n_points), dim=1)
    # The empty clusters first, in ascending order; the j-th of them takes the j-th farthest point.
    homes = torch.sort(empty.to(torch.int32), dim=1, descending=True, stable=True).indices
    homes = homes[:, : best.indices.shape[1]]
    rank = torch.arange(homes.shape[1], device=x.device).expand_as(homes)
    moves = (rank < empty.sum(1, keepdim=True)) & torch.isfinite(best.values)
    target = torch.where(moves, homes, index.gather(1, best.indices))
    return index.scatter(1, best.indices, target).to(torch.int32)
