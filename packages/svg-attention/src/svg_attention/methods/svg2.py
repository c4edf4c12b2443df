"""SVG2: cluster queries and keys, read the key clusters that hold the attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flash_kmeans import update
from svg_attention.layout import TokenLayout
from svg_attention.memory import LayerMemory
from svg_attention.methods.base import (
    MethodConfig,
    check_call,
    check_fraction,
    full_tiles,
    text_rows,
    token_order,
    valid_tokens,
)
from svg_attention.methods.budget import key_budget
from svg_attention.methods.clustering import Clusters, cluster_rows
from svg_attention.methods.dense import Dense
from svg_attention.plan import KeySummary, SparsePlan
from svg_attention.planning.centroid_error import centroid_error
from svg_attention.planning.dispatch import planner_for
from svg_attention.planning.probes import probe_mass, probe_means
from svg_attention.planning.selection import keep_budget, keep_top_p
from svg_attention.tiles import TILE_ROWS, count_tiles, match_heads


@dataclass(frozen=True, kw_only=True)
class SVG2(MethodConfig):
    """Cluster video queries and keys per head; let each query tile read whole key clusters.

    Queries and keys are sorted by cluster. A tile of 128 sorted queries estimates the mass of each
    key cluster with the mean queries of a few of its rows at a time, and reads clusters of falling
    mass per key until they reach `top_p` of it, or as many as a density allows. Text is exact:
    every query reads it and it reads everything.

    Args:
        q_clusters: query clusters per head.
        k_clusters: key clusters per head.
        top_p: share of the estimated mass that each tile reads.
        min_keep: fraction of the key clusters that each tile reads at least.
        density: fraction of the valid query-key pairs to compute, text included; replaces `top_p`
            and `min_keep`. The realised density is at or just below it.
        compensate: let unread clusters take part through their mean key and value.
        route: "mass" reads the clusters with most mass; "error" those that their centroid would
            replace worst, as many keys as "mass" would have read. Needs `compensate`.
        probe_rows: neighbouring queries that share one mean when a tile estimates masses and
            errors; divides 128. Fewer rows choose better and cost more: `1 / probe_rows` of the
            logits of all queries with all centroids (with all keys for `route="error"`).
        first_iterations: k-means rounds of the first planned call of a layer.
        step_iterations: k-means rounds of later calls, from the centroids of the one before.

    Source: Sparse VideoGen2, arXiv:2505.18875; compensation and routing SVG-EAR, arXiv:2603.08982.
    """

    q_clusters: int = 300
    k_clusters: int = 1000
    top_p: float = 0.9
    min_keep: float = 0.10
    density: float | None = None
    compensate: bool = False
    route: Literal["mass", "error"] = "mass"
    probe_rows: int = 16
    first_iterations: int = 50
    step_iterations: int = 2

    def __post_init__(self) -> None:
        for name in (
            *("q_clusters", "k_clusters", "probe_rows"),
            *("first_iterations", "step_iterations"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if TILE_ROWS % self.probe_rows:
            raise ValueError(
                f"probe_rows must divide the {TILE_ROWS} rows of a tile, got {self.probe_rows}; "
                "take a power of two"
            )
        check_fraction("top_p", self.top_p)
        if not 0.0 <= self.min_keep <= 1.0:
            raise ValueError(f"min_keep must lie in [0, 1], got {self.min_keep}")
        if self.density is not None:
            check_fraction("density", self.density)
        if self.route not in ("mass", "error"):
            raise ValueError(f"route must be 'mass' or 'error', got {self.route!r}")
        if self.route == "error" and not self.compensate:
            raise ValueError(
                "route='error' ranks clusters by the error of compensation; set compensate=True"
            )

    def plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: TokenLayout,
        memory: LayerMemory,
        text_lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
        scale: float | None = None,
    ) -> SparsePlan:
        """Cluster, choose and build the plan; see `Method.plan`.

        Raises:
            ValueError: if there are more clusters than video tokens.
        """
        check_call(query, key, value, layout, text_lengths)
        if (self.top_p if self.density is None else self.density) >= 1.0:
            return Dense().plan(
                query, key, value, layout=layout, memory=memory, text_lengths=text_lengths
            )
        most = max(self.q_clusters, self.k_clusters)
        if most > layout.video_tokens:
            raise ValueError(
                f"{most} clusters cannot be made of {layout.video_tokens} video tokens; "
                f"ask for at most {layout.video_tokens} (a good number is a hundredth of them)"
            )
        video = slice(layout.video_start, layout.video_start + layout.video_tokens)
        query_clusters, key_clusters = self._cluster(
            query[:, :, video], key[:, :, video], memory, generator
        )
        return self.plan_clusters(
            query,
            key,
            value,
            query_clusters,
            key_clusters,
            layout=layout,
            text_lengths=text_lengths,
            scale=scale,
        )

    def plan_clusters(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_clusters: Clusters,
        key_clusters: Clusters,
        *,
        layout: TokenLayout,
        text_lengths: Tensor | None = None,
        scale: float | None = None,
    ) -> SparsePlan:
        """Choose and build the plan of a call whose video tokens are clustered.

        Args:
            query: as for `plan`.
            key: as for `plan`.
            value: as for `plan`.
            query_clusters: clusters of the video rows of `query`.
            key_clusters: clusters of the video rows of `key`.
            layout: as for `plan`.
            text_lengths: as for `plan`.
            scale: as for `plan`.
        """
        batch, heads, tokens, width = query.shape
        scale = width**-0.5 if scale is None else scale
        video = slice(layout.video_start, layout.video_start + layout.video_tokens)
        planner = planner_for(query)
        means = probe_means(
            query[:, :, video], query_clusters.order, probe_rows=self.probe_rows, backend=planner
        )
        budget = None
        if self.density is not None:
            budget = key_budget(layout, text_lengths, self.density, query)[:, None, None]
        mask, summary = self._choose(
            means, key[:, :, video], value[:, :, video], key_clusters, budget, scale, planner
        )
        # Tiles past the video read nothing but text, unless they hold text rows themselves.
        spare = count_tiles(tokens) - mask.shape[2]
        if spare:
            mask = torch.nn.functional.pad(mask, (0, 0, 0, spare))
        full = full_tiles(layout, text_lengths, batch, query)
        lengths = valid_tokens(layout, text_lengths, batch, query)
        return SparsePlan.from_cluster_mask(
            mask,
            match_heads(key_clusters.sizes, heads),
            query_length=tokens,
            key_length=tokens,
            query_order=token_order(layout, query_clusters.order, query),
            key_order=token_order(layout, key_clusters.order, key),
            tail=text_rows(layout, text_lengths, batch, query),
            full_tiles=full,
            query_lengths=lengths,
            key_lengths=lengths,
            summary=None if summary is None else weigh_summary(summary, mask, full),
        )

    def _cluster(
        self,
        queries: Tensor,
        keys: Tensor,
        memory: LayerMemory,
        generator: torch.Generator | None,
    ) -> tuple[Clusters, Clusters]:
        """Cluster the video rows of both sides and remember the centroids."""
        query_clusters = cluster_rows(
            queries,
            self.q_clusters,
            remembered=memory.query_centroids,
            first_iterations=self.first_iterations,
            step_iterations=self.step_iterations,
            generator=generator,
        )
        key_clusters = cluster_rows(
            keys,
            self.k_clusters,
            remembered=memory.key_centroids,
            first_iterations=self.first_iterations,
            step_iterations=self.step_iterations,
            generator=generator,
        )
        memory.query_centroids = query_clusters.centroids
        memory.key_centroids = key_clusters.centroids
        return query_clusters, key_clusters

    def _choose(
        self,
        means: Tensor,
        keys: Tensor,
        values: Tensor,
        clusters: Clusters,
        budget: Tensor | None,
        scale: float,
        planner: str,
    ) -> tuple[Tensor, KeySummary | None]:
        """Return the clusters each tile reads and, if asked for, what stands in for the rest.

        The weights of the summary are the logarithms of all cluster sizes, `[B, H, 1, C]`.
        """
        heads, length = means.shape[1], keys.shape[2]
        sizes = match_heads(clusters.sizes, heads)
        probed: dict[str, Any] = {
            "length": length,
            "probe_rows": self.probe_rows,
            "scale": scale,
            "backend": planner,
        }
        mass = probe_mass(
            means, clusters.centroids, clusters.sizes, per_key=budget is not None, **probed
        )
        if budget is not None:
            room = budget.float().expand(mass.shape[:3])
            mask = keep_budget(mass, sizes, room, backend=planner)
        else:
            mask = keep_top_p(
                mass / sizes.clamp(min=1)[:, :, None],
                mass,
                sizes,
                top_p=self.top_p,
                min_clusters=int(self.min_keep * sizes.shape[-1]),
                backend=planner,
            )
        if not self.compensate:
            return mask, None
        value_means = mean_values(values, clusters)
        summary = KeySummary(
            keys=clusters.centroids,
            values=value_means,
            log_weights=sizes.float().log()[:, :, None],
        )
        if self.route == "error":
            room = (
                (mask * sizes[:, :, None]).sum(dim=-1).float()
                if budget is None
                else budget.float().expand(mask.shape[:3])
            )
            errors = centroid_error(
                means,
                keys,
                values,
                clusters.order,
                clusters.centroids,
                value_means,
                clusters.sizes,
                **probed,
            )
            mask = keep_budget(errors, sizes, room, backend=planner)
        return mask, summary


def mean_values(values: Tensor, clusters: Clusters) -> Tensor:
    """Return the mean value of each key cluster, `[B, H, C, D_v]`; 0 for an empty one."""
    batch, heads, rows, width = values.shape
    count = clusters.sizes.shape[-1]
    means = update(
        values.reshape(batch * heads, rows, width),
        clusters.labels.reshape(batch * heads, rows),
        count,
        previous=values.new_zeros(batch * heads, count, width),
    ).centroids
    return means.view(batch, heads, count, width)


def weigh_summary(summary: KeySummary, mask: Tensor, full: Tensor | None) -> KeySummary:
    """Give each tile the weights of the clusters it does not read, minus infinity elsewhere."""
    if full is not None:
        mask = mask | full[..., None]
    weights = summary.log_weights.expand(mask.shape).masked_fill(mask, -torch.inf)
    return KeySummary(keys=summary.keys, values=summary.values, log_weights=weights)
