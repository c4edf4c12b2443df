"""One call of a method in a ring."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svg_attention.errors import UnsupportedError
from svg_attention.layout import TokenLayout
from svg_attention.memory import LayerMemory
from svg_attention.methods import SVG2, Method
from svg_attention.methods.budget import key_budget
from svg_attention.methods.call import AttentionCall
from svg_attention.plan import KeySummary, SparsePlan
from svg_attention.planning.clustering import Clusters
from svg_attention.planning.clusters import Selection, TileReads, merge_reads, select_clusters
from svg_attention.planning.dispatch import planner_for, select_planner
from svg_attention.ring.clustering import SharedClusters, cluster_shared_rows, mean_of_shares
from svg_attention.ring.dense import attend_dense, attend_shares
from svg_attention.ring.exchange import Ring
from svg_attention.rows import take_rows
from svg_attention.tiles import match_heads

# Settings of SVG2 that need more of the keys than their centroids to choose or to correct, or what
# another call chose, with the value that they have without.
NOT_IN_A_RING = {
    "route": "mass",
    "metric": "euclidean",
    "repair_rows": 0,
    "first_order": False,
    "share_branches": False,
    "share_steps": 1,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class RingOutput:
    """Hold what a call in a ring gave.

    Attributes:
        out: `[B, H, S_rank, D]`, typed as the queries.
        density: fp32 `[B, H]`, the pairs computed of the queries here, as a fraction of all their
            pairs; None for a dense call.
        broken: bool `[B, H]`, heads that read everything because a query or key is not finite;
            None for a dense call.
    """

    out: Tensor
    density: Tensor | None = None
    broken: Tensor | None = None


def attend_in_ring(
    method: Method,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    ring: Ring,
    layout: TokenLayout,
    memory: LayerMemory | None = None,
    text_lengths: Tensor | None = None,
    generator: torch.Generator | None = None,
    scale: float | None = None,
    backend: str = "auto",
    dense_backend: str = "auto",
) -> RingOutput:
    """Plan and compute a call whose video tokens are shared by the processes of a ring.

    Every process holds its share of the video tokens, and all of the text. Clusters of queries and
    keys are those of one device. Tiles are others: queries stay, so of a cluster each process fills
    tiles with the rows that it has, and each chooses for itself what it reads. The share of
    attention that a tile reads (or the density) is as asked, the plan is not the same.

    Keys and values travel in plan order, each process's whole share, while what is here is
    computed. To leave out clusters that no tile of a process reads, the host would have to wait for
    their sizes, and in a clip of 75,600 tokens on two processes they hold 0.1 % of the rows at a
    density of 25 %, and 1 to 5 % at 10 %.

    Args:
        method: `Dense`, or `SVG2` with settings that only read centroids to choose.
        query: `[B, H, S_rank, D]`: this process's video tokens, and the text before or after them.
        key: `[B, H_kv, S_rank, D]`.
        value: `[B, H_kv, S_rank, D]`.
        ring: the processes; shares are those of `Ring.shares`.
        layout: of the whole sequence.
        memory: see `Method.plan`.
        text_lengths: see `Method.plan`.
        generator: see `Method.plan`; in the same state on every process.
        scale: factor of the logits, `D ** -0.5` when None.
        backend: who computes a sparse call, as for `sparse_attention`.
        dense_backend: who computes a dense one.

    Raises:
        ValueError: if the tensors are no share of a call over the layout.
        UnsupportedError: if the method cannot plan in a ring, or no backend can run this.
    """
    refuse_in_ring(method)
    counts = ring.shares(layout.video_tokens)
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        layout=replace(layout, grid=(1, 1, counts[ring.rank])),
        memory=LayerMemory() if memory is None else memory,
        text_lengths=text_lengths,
        generator=generator,
        scale=scale or 0.0,
    )
    if method.is_full or not isinstance(method, SVG2):
        return RingOutput(out=attend_dense(call, ring, counts, backend=dense_backend))
    return _attend_sparse(method, call, layout, ring, counts, backend)


def refuse_in_ring(method: Method) -> None:
    """Raise UnsupportedError if a method cannot plan in a ring."""
    reason = ""
    if method.is_full:
        return
    if not isinstance(method, SVG2):
        reason = f"{type(method).__name__} plans from the keys of the whole sequence"
    else:
        other = [
            f"{n}={v!r}" for n in NOT_IN_A_RING if (v := getattr(method, n)) != NOT_IN_A_RING[n]
        ]
        if other:
            reason = f"SVG2 with {', '.join(other)} needs more than the centroids of the keys"
    if reason:
        raise UnsupportedError(
            {
                "ring": f"{reason}, of which each process of a ring has a share; split heads "
                "instead (Ulysses), or take SVG2 with top_p or density alone"
            }
        )


def _attend_sparse(
    method: SVG2,
    call: AttentionCall,
    layout: TokenLayout,
    ring: Ring,
    counts: tuple[int, ...],
    backend: str,
) -> RingOutput:
    memory, mine = call.memory, counts[ring.rank]
    q_clusters, k_clusters = method.cluster_counts(layout.video_tokens)
    queries, keys = (
        cluster_shared_rows(
            call.video(rows),
            clusters,
            ring=ring,
            counts=counts,
            remembered=remembered,
            iterations=(method.first_iterations, method.step_iterations),
            generator=call.generator,
        )
        for rows, clusters, remembered in (
            (call.query, q_clusters, memory.query_centroids),
            (call.key, k_clusters, memory.key_centroids),
        )
    )
    memory.query_centroids, memory.key_centroids = queries.here.centroids, keys.here.centroids
    order = call.token_order(keys.here.order, call.key.shape[1])
    own = [x if order is None else take_rows(x, order) for x in (call.key, call.value)]
    # They travel while tiles choose and attend to what is here.
    coming = ring.pass_on([x[:, :, :mine] for x in own], counts[ring.holder(1)])
    reads = _Reads(method, call, layout, ring, queries.here, keys)
    out = attend_shares(
        call.query,
        (own[0], own[1]),
        reads.own_plan(),
        coming,
        reads.plan,
        ring=ring,
        counts=counts,
        scale=call.scale,
        backend=backend,
    )
    return RingOutput(out=out.to(call.query.dtype), density=reads.density(), broken=reads.broken)


class _Reads:
    """What the tiles of a process read of the keys of each.

    Attributes:
        broken: bool `[B, H]`, heads that read everything.
    """

    def __init__(
        self,
        method: SVG2,
        call: AttentionCall,
        layout: TokenLayout,
        ring: Ring,
        queries: Clusters,
        keys: SharedClusters,
    ) -> None:
        self._call, self._keys, self._ring = call, keys, ring
        self._counts = ring.shares(layout.video_tokens)
        video = call.video(call.query)
        self._planner = select_planner(planner_for(video), call.device)
        self._query_order = call.token_order(queries.order, call.heads)
        self.broken = queries.broken | match_heads(keys.here.broken, call.heads)
        whole = replace(keys.here, sizes=keys.sizes)
        self._mask, _, _ = select_clusters(
            self._planner,
            self._planner.probe_means(video, queries.order, method.probe_rows),
            call.video(call.key),
            call.video(call.value),
            whole,
            None,
            _selection(method, call, layout, keys),
            call.scale,
            queries.order.shape[-1],
        )
        self._value_means = None
        if method.compensate:
            self._value_means = mean_of_shares(call.video(call.value), keys, ring)
        self._pairs: Tensor | float = 0.0
        self._most: Tensor | float = 0.0

    def own_plan(self) -> SparsePlan:
        """Return the plan of the keys here, text among them.

        Centroids stand for the unread keys of all processes; they take part once, with these.
        """
        reads, summary = self._merge(self._ring.rank, self._call.text_rows()), None
        if self._value_means is not None and reads.log_weights is not None:
            summary = KeySummary(
                keys=self._keys.here.centroids,
                values=self._value_means,
                log_weights=reads.log_weights,
            )
        lengths = self._call.valid_tokens()
        return self._plan(reads, self._call.layout.tokens, lengths, summary)

    def plan(self, holder: int) -> SparsePlan:
        """Return the plan of the keys of another process, which has sorted them by cluster."""
        return self._plan(self._merge(holder, 0), self._counts[holder], None, None)

    def density(self) -> Tensor:
        """Return the pairs of the plans made so far, as a fraction of all pairs; fp32 `[B, H]`."""
        return (torch.as_tensor(self._pairs) / self._most).float()

    def _merge(self, holder: int, text: Tensor | int) -> TileReads:
        heads = self._call.heads
        return merge_reads(
            self._planner,
            self._mask,
            None,
            match_heads(self._keys.shares[holder], heads),
            self.broken,
            self._value_means,
            tokens=self._call.layout.tokens,
            text=text,
            full_tiles=self._call.full_tiles(),
            weights=match_heads(self._keys.sizes, heads),
        )

    def _plan(
        self, reads: TileReads, keys: int, lengths: Tensor | None, summary: KeySummary | None
    ) -> SparsePlan:
        plan = SparsePlan(
            query_length=self._call.layout.tokens,
            key_length=keys,
            query_order=self._query_order,
            run_starts=reads.run_starts,
            run_lengths=reads.run_lengths,
            run_multiple=reads.run_multiple,
            tile_order=reads.tile_order,
            query_lengths=self._call.valid_tokens(),
            key_lengths=lengths,
            summary=summary,
        )
        valid = keys if lengths is None else lengths.double()[:, None]
        self._pairs = self._pairs + plan.density().double() * valid
        self._most = self._most + valid
        return plan


def _selection(
    method: SVG2, call: AttentionCall, layout: TokenLayout, keys: SharedClusters
) -> Selection:
    """Return how a tile selects, which is how it would on one device."""
    budget = None
    if method.density is not None:
        budget = key_budget(layout, call.text_lengths, method.density, call.query).float()
    return Selection(
        budget=budget,
        top_p=method.top_p,
        min_clusters=int(method.min_keep * keys.sizes.shape[-1]),
        probe_rows=method.probe_rows,
    )
