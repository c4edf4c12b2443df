"""SVG2: cluster queries and keys, read the key clusters that hold the attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from svg_attention import config
from svg_attention.layout import TokenLayout
from svg_attention.methods.base import Method
from svg_attention.methods.budget import key_budget
from svg_attention.methods.call import AttentionCall
from svg_attention.methods.probes import attend_text, exact_rows, probe_places, probed_order
from svg_attention.plan import ExactRows, KeySummary, ProbeResidual, SparsePlan
from svg_attention.planning.clustering import Clusters, cluster_rows
from svg_attention.planning.clusters import (
    Choice,
    Selection,
    TileReads,
    mean_slope,
    mean_values,
    plan_clusters,
    read_alike,
)
from svg_attention.planning.response import respond, response_root
from svg_attention.tiles import TILE_ROWS, match_heads

if TYPE_CHECKING:
    from typing_extensions import Self

# Published cluster counts, made for 32,760 tokens and more, and the rows that a cluster of a
# shorter sequence should hold on average: enough to be one run of keys that a kernel reads at once,
# and to spread the cost of its centroid.
Q_CLUSTERS, K_CLUSTERS = 300, 1000
ROWS_PER_Q_CLUSTER, ROWS_PER_K_CLUSTER = 64, 16
MOST_REPAIR_ROWS = 256


def cluster_counts(
    tokens: int, q_clusters: int = Q_CLUSTERS, k_clusters: int = K_CLUSTERS
) -> tuple[int, int]:
    """Shrink cluster counts to a short sequence.

    Args:
        tokens: video tokens.
        q_clusters: query clusters of a long one.
        k_clusters: key clusters of a long one.

    Returns:
        `min(q_clusters, tokens // 64)` and `min(k_clusters, tokens // 16)`, each at least 1.
    """
    return (
        max(1, min(q_clusters, tokens // ROWS_PER_Q_CLUSTER)),
        max(1, min(k_clusters, tokens // ROWS_PER_K_CLUSTER)),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class SVG2(Method):
    """Cluster video queries and keys per head; let each query tile read whole key clusters.

    Queries and keys are sorted by cluster. With the mean queries of a few rows at a time, a tile of
    128 sorted queries estimates the mass of each key cluster, the share of its attention that falls
    on it. It reads clusters in descending mass per key until they reach `top_p` of the mass, or as
    many as a density allows. Text is exact: every query reads it and it reads everything.

    Args:
        q_clusters: query clusters per head; None takes as many as suit the sequence, at most 300
            (see `cluster_counts`).
        k_clusters: key clusters per head; None likewise, at most 1000.
        top_p: share of the estimated mass that each tile reads.
        min_keep: fraction of the key clusters that each tile reads at least.
        density: fraction of the valid query-key pairs to compute, text included; replaces `top_p`
            and `min_keep`. What is chosen is at or just below it; on a GPU runs of keys are then
            rounded up to 8, which adds some per cent of it.
        spend: "tile" spends a density equally on every tile; "call" spends half of it on all tiles
            and heads of a batch item, where it lowers the estimated error most. Then a head depends
            on which others are on its device. Needs a density and `route="error"`.
        count_probes: let `density` hold what probes and exact rows read, too (`probe_density`).
        compensate: let unread clusters take part through their mean key and value.
        route: "mass" reads the clusters with most mass; "error" those that their centroid would
            replace worst, as many keys as "mass" would have read; "scores" the same by the error of
            their scores alone. Both need `compensate`.
        correct_bias: raise the weight of each centroid to what the probes of a tile find its
            cluster to weigh: a mean key weighs less than its keys do on average. Needs
            `route="error"`, whose pass over the keys finds it; clusters that one key dominates,
            where the right weight on the mean value does harm, are then read.
        correct_residual: add to each row what its probe's exact attention output exceeds its
            sparse output by, as far as neighbouring probes foretell each other, head by head. A
            probe takes the place of every `probe_rows`-th row of a tile. Needs `route="error"`.
        first_order: add the first-order term of the unread clusters, with the slope of a head's
            average cluster; for comparison with methods that have one. Needs `compensate`; not with
            `correct_residual`.
        repair_rows: video rows of each head, at most 256, whose exact outputs correct all others: a
            regression from sparse output and query predicts what a row lacks, as far as these rows
            foretell each other, head by head. 0 for none; 64 cost 64 dense rows.
        share_branches: let the guidance branches of a step read alike: those after the first take
            its clusters and its choice, and spare k-means and probes. What all of them leave out
            cancels where guidance takes their difference. A layer then keeps its choice, 12 bytes a
            token and head and one for each tile and cluster. Not with `correct_residual`.
        share_steps: steps in a row that read alike, as branches do with `share_branches`: the first
            of them chooses. A CUDA graph replays what was captured, a step that chooses or one that
            follows. Not with `correct_residual`.
        probe_rows: neighbouring queries that share one mean when a tile estimates masses and
            errors; divides 128. Fewer rows choose better and cost more: `1 / probe_rows` of the
            logits of all queries with all centroids (with all keys for `route="error"`).
        metric: distance in which rows are clustered: "euclidean", or "response", which measures
            keys by how much they change the scores of the queries, and the directions of queries
            by how much they change the scores of the keys.
        first_iterations: k-means rounds of the first planned call of a layer.
        step_iterations: k-means rounds of later calls, from the centroids of the one before.

    Source: Sparse VideoGen2, arXiv:2505.18875; compensation and routing SVG-EAR, arXiv:2603.08982;
    response metric and repair SparsePR, arXiv:2608.18484.
    """

    q_clusters: int | None = None
    k_clusters: int | None = None
    top_p: float = 0.9
    min_keep: float = 0.10
    density: float | None = None
    spend: Literal["tile", "call"] = "tile"
    count_probes: bool = False
    compensate: bool = False
    route: Literal["mass", "error", "scores"] = "mass"
    correct_bias: bool = False
    correct_residual: bool = False
    first_order: bool = False
    repair_rows: int = 0
    share_branches: bool = False
    share_steps: int = 1
    probe_rows: int = 16
    metric: Literal["euclidean", "response"] = "euclidean"
    first_iterations: int = 50
    step_iterations: int = 2

    def __post_init__(self) -> None:
        checked = {
            name: config.integer(name, getattr(self, name), least=1)
            for name in ("probe_rows", "first_iterations", "step_iterations", "share_steps")
        }
        for name in ("q_clusters", "k_clusters"):
            if getattr(self, name) is not None:
                checked[name] = config.integer(name, getattr(self, name), least=1)
        checked["repair_rows"] = config.integer("repair_rows", self.repair_rows, least=0)
        if checked["repair_rows"] > MOST_REPAIR_ROWS:
            raise ValueError(
                f"repair_rows must be at most {MOST_REPAIR_ROWS}, whose products are inverted for "
                f"each head; got {self.repair_rows}"
            )
        if TILE_ROWS % checked["probe_rows"]:
            raise ValueError(
                f"probe_rows must divide the {TILE_ROWS} rows of a tile, got {self.probe_rows}; "
                "take a power of two"
            )
        density = None if self.density is None else config.fraction("density", self.density)
        config.assign(
            self,
            **checked,
            top_p=config.fraction("top_p", self.top_p),
            min_keep=config.fraction("min_keep", self.min_keep, zero=True),
            density=density,
            spend=config.choice("spend", self.spend, ("tile", "call")),
            count_probes=config.flag("count_probes", self.count_probes),
            compensate=config.flag("compensate", self.compensate),
            route=config.choice("route", self.route, ("mass", "error", "scores")),
            metric=config.choice("metric", self.metric, ("euclidean", "response")),
            correct_bias=config.flag("correct_bias", self.correct_bias),
            correct_residual=config.flag("correct_residual", self.correct_residual),
            first_order=config.flag("first_order", self.first_order),
            share_branches=config.flag("share_branches", self.share_branches),
        )
        if self.route != "mass" and not self.compensate:
            raise ValueError(
                f"route={self.route!r} ranks clusters by the error of compensation; set "
                "compensate=True"
            )
        if self.spend == "call" and (self.density is None or self.route != "error"):
            raise ValueError(
                "spend='call' shares a density by the errors of routing; set density and "
                "route='error'"
            )
        for name in ("correct_bias", "correct_residual"):
            if getattr(self, name) and self.route != "error":
                raise ValueError(
                    f"{name} takes what the probes of error routing find; set route='error'"
                )
        if self.first_order and (self.correct_residual or not self.compensate):
            raise ValueError(
                "first_order adds to what centroids stand in for, without probes among the rows; "
                "set compensate=True, and correct_residual=False"
            )
        if self.shares and self.correct_residual:
            raise ValueError(
                "share_branches and share_steps spare the probes that correct_residual needs; set "
                "it or them"
            )
        if self.correct_residual and self.probe_rows < 2:
            raise ValueError("correct_residual needs probes of at least 2 rows, got 1")

    @classmethod
    def corrected(cls, density: float, **changes: Any) -> Self:
        """Build SVG2 with every correction that pays, for sparse runs without a dense step.

        Compensated, routed by error, with the bias of centroids, repaired from 64 exact rows,
        clustered in the response metric, and alike in the guidance branches of a step and in every
        two steps; probes and exact rows count in the density.

        ```python
        sparsify(pipe, SVG2.corrected(0.35), Schedule.sparse())     # 4 or 8 steps
        ```

        Args:
            density: fraction of the valid query-key pairs to compute, probes included.
            changes: other settings.
        """
        best: dict[str, Any] = {
            "compensate": True,
            "route": "error",
            "correct_bias": True,
            "repair_rows": 64,
            "metric": "response",
            "share_branches": True,
            "share_steps": 2,
            "first_iterations": 10,
            "count_probes": True,
        }
        return cls(**{**best, "density": density, **changes})

    @property
    def shares(self) -> bool:
        """Whether calls read as an earlier one chose."""
        return self.share_branches or self.share_steps > 1

    @property
    def is_full(self) -> bool:
        """Whether the density, or without one `top_p`, is 1."""
        return (self.top_p if self.density is None else self.density) >= 1.0

    @property
    def heads_differ(self) -> bool:
        """Whether tiles choose by `top_p`, and each call for itself."""
        return self.density is None and not self.shares

    @property
    def waits(self) -> bool:
        """Always: queries are clustered while keys are on their way, and keys while values are."""
        return True

    def build(self, call: AttentionCall) -> SparsePlan:
        """Cluster, choose and build the plan, or read as an earlier call chose.

        Raises:
            ValueError: if there are more clusters than video tokens.
        """
        choice = self.choice_of_another(call)
        if choice is not None:
            call.wait()
            return self.follow(call, choice)
        return self.plan_clusters(call, *self.cluster(call))

    def choice_of_another(self, call: AttentionCall) -> Choice | None:
        """Return the choice that a call follows; None if it is to choose for itself.

        It is that of another guidance branch in this step, or of an earlier step of this branch.
        """
        leader = call.leader if self.share_branches else None
        memory = call.memory if leader is None else leader
        choice: Choice | None = memory.choice
        if choice is None or memory.chooser != self:
            return None
        if not choice.fits(call.video(call.query), call.video(call.key)):
            return None
        if leader is None:
            if memory.readers >= self.share_steps:
                return None
            memory.readers += 1
        return choice

    def cluster_counts(self, tokens: int) -> tuple[int, int]:
        """Return the query clusters and the key clusters of so many video tokens.

        Raises:
            ValueError: if there are more clusters than video tokens.
        """
        suited = cluster_counts(tokens)
        counts = self.q_clusters or suited[0], self.k_clusters or suited[1]
        if max(counts) > tokens:
            raise ValueError(
                f"{max(counts)} clusters cannot be made of {tokens} video tokens; ask for at most "
                f"{tokens}, or leave q_clusters and k_clusters out"
            )
        return counts

    def cluster(self, call: AttentionCall) -> tuple[Clusters, Clusters]:
        """Cluster the video rows of queries and keys, and remember where the next step starts.

        Raises:
            ValueError: if there are more clusters than video tokens.
        """
        memory = call.memory
        q_clusters, k_clusters = self.cluster_counts(call.layout.video_tokens)
        iterations = (self.first_iterations, self.step_iterations)
        query, key = call.video(call.query), call.video(call.key)
        rows = (query, key)
        if self.metric == "response":
            call.wait("key")
            keys_root = match_heads(response_root(key, key.shape[1]), call.heads)
            rows = (
                respond(query, keys_root, unit=True),
                respond(key, response_root(query, key.shape[1])),
            )
        queries = cluster_rows(
            rows[0],
            q_clusters,
            remembered=memory.query_centroids,
            iterations=iterations,
            generator=call.generator,
        )
        call.wait("key")
        keys = cluster_rows(
            rows[1],
            k_clusters,
            remembered=memory.key_centroids,
            iterations=iterations,
            generator=call.generator,
        )
        memory.query_centroids, memory.key_centroids = queries.centroids, keys.centroids
        if self.metric == "response":
            # Scores need mean rows of the call's own space.
            queries = replace(queries, centroids=mean_values(query, queries))
            keys = replace(keys, centroids=mean_values(key, keys))
        return queries, keys

    def plan_clusters(
        self, call: AttentionCall, query_clusters: Clusters, key_clusters: Clusters
    ) -> SparsePlan:
        """Choose and build the plan of a call whose video tokens are clustered.

        Args:
            call: the call.
            query_clusters: clusters of its video queries.
            key_clusters: clusters of its video keys.
        """
        if self.compensate or self.repair_rows:  # otherwise nobody reads values before attention
            call.wait()
        layout = call.layout
        rows, probe, sorted_rows = layout.video_tokens, None, query_clusters.order
        if self.correct_residual:
            row, probe = probe_places(rows, self.probe_rows, call.device)
            rows = len(row)
            query_clusters = replace(query_clusters, order=query_clusters.order[..., row])
        budget = None
        if self.density is not None:
            density = self.density - (self.probe_density(layout) if self.count_probes else 0.0)
            if density <= 0.0:
                raise ValueError(
                    f"probes and exact rows read {self.probe_density(layout):.1%} of the pairs, "
                    f"which leaves nothing of a density of {self.density}; ask for more, or for "
                    "more probe_rows or fewer repair_rows"
                )
            budget = key_budget(layout, call.text_lengths, density, call.query, rows).float()
        reads = plan_clusters(
            call.video(call.query),
            call.video(call.key),
            call.video(call.value),
            query_clusters,
            key_clusters,
            Selection(
                budget=budget,
                shared=self.spend == "call",
                gather_heads=None if call.head_share is None else call.head_share.gather,
                top_p=self.top_p,
                min_clusters=int(self.min_keep * key_clusters.sizes.shape[-1]),
                by_error=self.route == "error",
                by_scores=self.route == "scores",
                correct_bias=self.correct_bias,
                probe_rows=self.probe_rows,
                return_probes=self.correct_residual,
                return_read=self.shares,
            ),
            tokens=rows + layout.text_tokens,
            text=call.text_rows(),
            full_tiles=call.full_tiles(rows),
            scale=call.scale,
            compensate=self.compensate,
        )
        if reads.read is not None:
            call.memory.choice = Choice(
                query_order=sorted_rows, key_clusters=key_clusters, read=reads.read
            )
            call.memory.chooser, call.memory.readers = self, 1
        query_order = call.token_order(query_clusters.order, call.heads)
        residual = None
        if probe is not None and reads.probes is not None:
            count = rows - layout.video_tokens
            queries, outputs, lse = (x[:, :, :count] for x in reads.probes)
            outputs = attend_text(call, queries, outputs, lse)
            residual = ProbeResidual(
                queries=queries, outputs=outputs, rows=self.probe_rows, positions=rows
            )
            query_order = probed_order(call, query_clusters.order, probe)
        plan = self._plan(call, reads, query_order, key_clusters, rows, residual)
        known = self._exact_rows(call, sorted_rows, query_clusters.order)
        return replace(plan, exact_rows=known, probe_density=self.probe_density(layout))

    def follow(self, call: AttentionCall, choice: Choice) -> SparsePlan:
        """Build the plan of a call that reads what another branch or an earlier step chose.

        Its centroids are the means of its own keys and values over the other's clusters. Nothing is
        clustered or probed.

        Args:
            call: the call.
            choice: of the call that chose.
        """
        layout = call.layout
        query, key, value = (call.video(x) for x in (call.query, call.key, call.value))
        clusters = replace(choice.key_clusters, centroids=mean_values(key, choice.key_clusters))
        broken = ~(_finite(query) & match_heads(_finite(key), call.heads))
        reads = read_alike(
            choice, clusters, value, broken | match_heads(clusters.broken, call.heads),
            tokens=layout.tokens, text=call.text_rows(), full_tiles=call.full_tiles(),
            compensate=self.compensate,
        )  # fmt: skip
        order = choice.query_order
        plan = self._plan(
            call, reads, call.token_order(order, call.heads), clusters, layout.video_tokens
        )
        known = self._exact_rows(call, order, order)
        rows = min(self.repair_rows, layout.video_tokens)
        return replace(plan, exact_rows=known, probe_density=rows / layout.tokens)

    def _plan(
        self,
        call: AttentionCall,
        reads: TileReads,
        query_order: Tensor | None,
        key_clusters: Clusters,
        rows: int,
        residual: ProbeResidual | None = None,
    ) -> SparsePlan:
        """Return the plan of what tiles read, video rows and probes being `rows`."""
        layout, summary = call.layout, None
        if reads.value_means is not None and reads.log_weights is not None:
            summary = KeySummary(
                keys=key_clusters.centroids,
                values=reads.value_means,
                log_weights=reads.log_weights,
            )
        if summary is not None and self.first_order:
            slope = mean_slope(call.video(call.key), call.video(call.value), key_clusters)
            summary = replace(summary, slope=slope)
        return SparsePlan(
            query_length=layout.tokens,
            key_length=layout.tokens,
            query_order=query_order,
            key_order=call.token_order(key_clusters.order, call.key.shape[1]),
            run_starts=reads.run_starts,
            run_lengths=reads.run_lengths,
            run_multiple=reads.run_multiple,
            tile_order=reads.tile_order,
            query_lengths=call.valid_tokens(rows),
            key_lengths=call.valid_tokens(),
            summary=summary,
            residual=residual,
            broken=reads.broken,
        )

    def _exact_rows(self, call: AttentionCall, order: Tensor, places: Tensor) -> ExactRows | None:
        """Return the exact rows that repair a call, None for none; see `exact_rows`."""
        count = min(self.repair_rows, call.layout.video_tokens)
        return exact_rows(call, count, order, places) if count else None

    def probe_density(self, layout: TokenLayout) -> float:
        """Return what the probes of a call take, counted as in `SparsePlan.probe_density`."""
        tokens, rows = layout.video_tokens, min(self.repair_rows, layout.video_tokens)
        repair = rows / layout.tokens
        if self.route == "mass":
            return repair
        if not self.correct_residual:
            return repair + 0.5 * -(-tokens // self.probe_rows) * tokens / layout.tokens**2
        return repair + -(-tokens // (self.probe_rows - 1)) * tokens / layout.tokens**2


def _finite(x: Tensor) -> Tensor:
    """Return which heads of `[B, H, N, D]` are finite, and small enough for their sum to be."""
    return x.sum(dim=(2, 3), dtype=torch.float32).isfinite()
