"""What one attention call computes: the value in which methods and backends meet."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svg_attention.planning.dispatch import select_planner
from svg_attention.planning.order import long_tiles_first
from svg_attention.planning.runs import cluster_runs, round_runs
from svg_attention.tiles import TILE_ROWS, count_tiles, match_heads


@dataclass(frozen=True, kw_only=True, eq=False)
class KeySummary:
    """Stand in for the keys that a query tile does not read, one centroid per cluster.

    In the softmax of tile `t`, cluster `c` takes part once, with the logit
    `query . keys[c] * scale + log_weights[t, c]` and the value `values[c]`.

    Attributes:
        keys: `[B, H, C, D]`, mean key of each cluster, typed as the keys.
        values: `[B, H, C, D]`, mean value of each cluster, typed as the values.
        log_weights: fp32 `[B, H, T, C]`, natural logarithm of how many keys the centroid stands
            for; minus infinity where the tile reads the cluster itself or the cluster is empty.
    """

    keys: Tensor
    values: Tensor
    log_weights: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class SparsePlan:
    """Say which keys each tile of query rows reads.

    Queries and keys are looked at in *plan order*: `order[i]` is the token at position `i`. A tile
    is `tile_rows` consecutive positions of the query order; it reads runs of consecutive positions
    of the key order. A plan is immutable, lives on the device, and has the same shapes for every
    call of one configuration, so building and running it needs no host synchronisation.

    Attributes:
        query_length: query tokens, padding included.
        key_length: key tokens, padding included.
        tile_rows: query rows of a tile.
        query_order: int32 `[B, H, query_length]`, or None for the given order.
        key_order: int32 `[B, H_kv, key_length]`, or None for the given order.
        run_starts: int32 `[B, H, T, R]`, first position of a run; the runs of a tile are disjoint
            and ascending, used slots come first.
        run_lengths: int32 `[B, H, T, R]`, positions in the run; 0 marks an unused slot.
        query_lengths: int32 `[B]`, valid queries, which come first in plan order; None for all.
            The output of the others is unspecified but finite.
        key_lengths: int32 `[B]`, valid keys, which come first in plan order; None for all.
            No run holds any other.
        run_multiple: every run is a multiple of this many rows, but for one that ends the valid
            keys.
        tile_order: int32 `[B, H, T]`, the order in which tiles are best started, head by head: tile
            `t` of head `h` of item `b` is `(b * H + h) * T + t`. None leaves it to the backend. It
            changes speed only.
        summary: centroids that stand in for what is not read, or None.
        broken: bool `[B, H]`, heads that read everything because a query or key is not finite; None
            where the method does not look.
        is_full: known without looking at the device that every query reads every valid key.
    """

    query_length: int
    key_length: int
    tile_rows: int = TILE_ROWS
    query_order: Tensor | None = None
    key_order: Tensor | None = None
    run_starts: Tensor
    run_lengths: Tensor
    query_lengths: Tensor | None = None
    key_lengths: Tensor | None = None
    run_multiple: int = 1
    tile_order: Tensor | None = None
    summary: KeySummary | None = None
    broken: Tensor | None = None
    is_full: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.run_starts.shape)
        if len(shape) != 4 or tuple(self.run_lengths.shape) != shape:
            raise ValueError(
                "run_starts and run_lengths must both be [B, H, T, R], "
                f"got {shape} and {tuple(self.run_lengths.shape)}"
            )
        tiles = count_tiles(self.query_length, self.tile_rows)
        if shape[2] != tiles:
            raise ValueError(
                f"{self.query_length} queries are {tiles} tiles of {self.tile_rows} rows, "
                f"but the runs describe {shape[2]}"
            )
        for name, length in (("query", self.query_length), ("key", self.key_length)):
            order = getattr(self, f"{name}_order")
            if order is not None and (order.dim() != 3 or order.shape[-1] != length):
                raise ValueError(f"{name}_order must be [B, H, {length}], got {tuple(order.shape)}")
        if self.summary is not None:
            weights = tuple(self.summary.log_weights.shape)
            if weights != (*shape[:3], self.summary.keys.shape[2]):
                raise ValueError(
                    f"log_weights must be [B, H, T, C] = {(*shape[:3], self.summary.keys.shape[2])}"
                    f", got {weights}"
                )

    @property
    def batch(self) -> int:
        """Batch size."""
        return self.run_starts.shape[0]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.run_starts.shape[1]

    @property
    def tiles(self) -> int:
        """Query tiles per head."""
        return self.run_starts.shape[2]

    @property
    def device(self) -> torch.device:
        """Device of the runs."""
        return self.run_starts.device

    @classmethod
    def full(
        cls,
        batch: int,
        heads: int,
        query_length: int,
        key_length: int,
        *,
        query_order: Tensor | None = None,
        key_order: Tensor | None = None,
        query_lengths: Tensor | None = None,
        key_lengths: Tensor | None = None,
        tile_rows: int = TILE_ROWS,
        device: torch.device | str | None = None,
    ) -> SparsePlan:
        """Build the plan in which every query reads every valid key."""
        shape = (batch, heads, count_tiles(query_length, tile_rows), 1)
        starts = torch.zeros(shape, dtype=torch.int32, device=device)
        lengths = torch.full_like(starts, key_length)
        if key_lengths is not None:
            lengths = key_lengths.to(torch.int32)[:, None, None, None].expand(shape).contiguous()
        return cls(
            query_length=query_length,
            key_length=key_length,
            tile_rows=tile_rows,
            query_order=query_order,
            key_order=key_order,
            run_starts=starts,
            run_lengths=lengths,
            query_lengths=query_lengths,
            key_lengths=key_lengths,
            is_full=True,
        )

    @classmethod
    def from_cluster_mask(
        cls,
        mask: Tensor,
        key_sizes: Tensor,
        *,
        query_length: int,
        key_length: int,
        query_order: Tensor | None = None,
        key_order: Tensor | None = None,
        tail: Tensor | int = 0,
        full_tiles: Tensor | None = None,
        query_lengths: Tensor | None = None,
        key_lengths: Tensor | None = None,
        summary: KeySummary | None = None,
        tile_rows: int = TILE_ROWS,
    ) -> SparsePlan:
        """Build a plan from the key clusters each query tile reads.

        Args:
            mask: bool `[B, H, T, C]`.
            key_sizes: integers `[B, H, C]`; `key_order` lists cluster 0 first, then cluster 1, ...
            query_length: query tokens, padding included.
            key_length: key tokens, padding included.
            query_order: see the class.
            key_order: see the class.
            tail: keys after the last cluster that every tile reads: a number or integers `[B]`.
            full_tiles: bool broadcastable with `[B, H, T]`, tiles that read every cluster.
            query_lengths: see the class.
            key_lengths: see the class.
            summary: see the class.
            tile_rows: see the class.
        """
        starts, lengths = cluster_runs(mask, key_sizes, tail=tail, full=full_tiles)
        return cls(
            query_length=query_length,
            key_length=key_length,
            tile_rows=tile_rows,
            query_order=query_order,
            key_order=key_order,
            run_starts=starts,
            run_lengths=lengths,
            query_lengths=query_lengths,
            key_lengths=key_lengths,
            summary=summary,
        )

    def rounded(self, multiple: int) -> SparsePlan:
        """Return this plan with runs rounded up to a multiple of rows, by reading real keys.

        The added keys make the result more exact and no key is counted twice. Only the last run of
        a tile may keep another length, where the valid keys end.

        Raises:
            ValueError: if the plan has a summary, which would then count keys twice.
        """
        if self.summary is not None:
            raise ValueError(
                "a plan with a summary cannot be rounded: the added keys would count twice; "
                "mask the ends of its runs instead"
            )
        limit = self.key_lengths
        if limit is None:
            limit = torch.full(
                (self.batch,), self.key_length, dtype=torch.int32, device=self.device
            )
        starts, lengths = round_runs(
            self.run_starts,
            self.run_lengths,
            multiple=multiple,
            limit=limit,
        )
        return replace(self, run_starts=starts, run_lengths=lengths, run_multiple=multiple)

    def ready(self) -> SparsePlan:
        """Return this plan as the kernels of its device want it, so that a run of it only computes.

        On a GPU runs are rounded up to what its copy engine moves at once (not beside a summary)
        and tiles are ordered; on a CPU nothing changes.
        """
        planner = select_planner("auto", self.device)
        if self.is_full or not planner.ORDERS_TILES:
            return self
        plan = self
        if plan.summary is None and plan.run_multiple % planner.RUN_MULTIPLE:
            plan = plan.rounded(planner.RUN_MULTIPLE)
        if plan.tile_order is None:
            order = long_tiles_first(plan.run_lengths).view(plan.run_starts.shape[:3])
            plan = replace(plan, tile_order=order)
        return plan

    def tile_rows_valid(self) -> Tensor:
        """Count the valid query rows of each tile: int64 `[B or 1, T]`."""
        valid = self.query_lengths
        if valid is None:
            valid = torch.full((1,), self.query_length, device=self.device)
        first = torch.arange(self.tiles, device=self.device) * self.tile_rows
        return (valid.long()[:, None] - first).clamp(min=0, max=self.tile_rows)

    def density(self) -> Tensor:
        """Return the query-key pairs computed exactly, as a fraction of all valid pairs.

        Returns:
            fp32 `[B, H]` on the plan's device.
        """
        rows = self.tile_rows_valid()
        pairs = (self.run_lengths.long().sum(dim=-1) * rows[:, None]).sum(dim=-1)
        keys: Tensor | int = self.key_length
        if self.key_lengths is not None:
            keys = self.key_lengths.long()[:, None]
        return (pairs.double() / (rows.sum(dim=-1, keepdim=True) * keys)).float()

    def to_mask(self) -> Tensor:
        """Return which key each query reads, bool `[B, H, query_length, key_length]`, by token.

        Meant for tests and pictures: it takes a byte per pair.
        """
        shape = (*self.run_starts.shape[:3], self.key_length + 1)
        edges = torch.zeros(shape, dtype=torch.int32, device=self.device)
        used = (self.run_lengths > 0).to(torch.int32)
        edges.scatter_add_(-1, self.run_starts.long(), used)
        edges.scatter_add_(-1, (self.run_starts + self.run_lengths).long(), -used)
        tiles = edges.cumsum(dim=-1)[..., : self.key_length] > 0
        mask = tiles.repeat_interleave(self.tile_rows, dim=2)[:, :, : self.query_length]
        if self.key_order is not None:
            order = match_heads(self.key_order, self.heads).long()
            mask = torch.zeros_like(mask).scatter_(-1, order[:, :, None].expand_as(mask), mask)
        if self.query_order is not None:
            order = self.query_order.long()[..., None]
            mask = torch.zeros_like(mask).scatter_(2, order.expand_as(mask), mask)
        return mask
