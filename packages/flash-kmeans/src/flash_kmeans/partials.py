"""Sums over parts of the points, for data in chunks or on several devices.

A part contributes `Partials`; parts are added, and `finish` turns the total into centroids and the
objective. Totals are kept in fp64, so the number of parts hardly matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import common, ops
from .checks import Metric


@dataclass
class Partials:
    """Hold what one pass over some points leaves behind, in fp64.

    Attributes:
        sums: `[K, D]`, points per cluster added up (times what the metric and weights fold in).
        totals: `[K]`, their weights.
        counts: `[K]`, their number.
        cost: `[]`, the objective against the centroids that gave the labels; zero for "dot", whose
            objective the sums give.
    """

    sums: Tensor
    totals: Tensor
    counts: Tensor
    cost: Tensor

    @classmethod
    def zeros(cls, n_clusters: int, dim: int, device: torch.device) -> Partials:
        """Return partials of no points."""
        shapes = ((n_clusters, dim), (n_clusters,), (n_clusters,), ())
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    def packed(self) -> Tensor:
        """Return everything in one vector, so that one reduction adds it all."""
        return torch.cat([t.reshape(-1) for t in (self.sums, self.totals, self.counts, self.cost)])

    def unpack(self, vector: Tensor) -> None:
        """Read back what `packed` wrote."""
        k, d = self.sums.shape
        sums, self.totals, self.counts, cost = vector.split([k * d, k, k, 1])
        self.sums, self.cost = sums.view(k, d), cost[0]

    def add(
        self,
        x: Tensor,
        labels: Tensor,
        centroids: Tensor,
        metric: Metric,
        weight: Tensor | None,
        backend: str,
    ) -> None:
        """Add points `[N, D]` with `labels` `[N]` under `centroids` `[K, D]`."""
        batch, names, means = x[None], labels[None], centroids[None]
        given = None if weight is None else weight[None]
        scale, mass = common.point_weights(batch, metric, given)
        sums, totals, sizes = ops.accumulate(batch, names, means.shape[1], scale, mass, backend)
        self.sums += sums[0]
        self.totals += totals[0]
        self.counts += sizes[0]
        if metric != "dot":
            costs = common.point_costs(batch, means, names, metric)
            self.cost += (costs if given is None else costs * given).sum(dtype=torch.float64)

    def finish(self, previous: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
        """Return centroids in the dtype of `previous` and the objective over them, fp64 `[]`."""
        new = common.finalize(self.sums[None], self.totals[None], previous[None], metric)[0]
        c, before = new.double(), previous.double()
        if metric == "dot":
            return new, -(self.sums * c).sum()
        if metric == "cosine":
            c, before = F.normalize(c, dim=-1), F.normalize(before, dim=-1)
        step = c - before
        mass = self.totals.unsqueeze(-1)
        # What every squared distance changes by when its centroid takes a step.
        change = (step * (mass * step - 2 * (self.sums - mass * before))).sum()
        return new, self.cost + (change / 2 if metric == "cosine" else change)
