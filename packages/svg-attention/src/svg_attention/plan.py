"""What one attention call computes: the value in which methods and backends meet."""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from svg_attention import config
from svg_attention.planning.dispatch import select_planner
from svg_attention.planning.order import long_tiles_first
from svg_attention.planning.runs import cluster_runs, round_runs
from svg_attention.tiles import TILE_ROWS, count_tiles, match_heads


@dataclass(frozen=True, kw_only=True, eq=False)
class KeySummary:
    """Represent the keys that a query tile does not read, one centroid per cluster.

    In the softmax of tile `t`, cluster `c` takes part once, with the logit
    `query . keys[c] * scale + log_weights[t, c]` and the value `values[c]`.

    Attributes:
        keys: `[B, H, C, D]`, mean key of each cluster, typed as the keys.
        values: `[B, H, C, D]`, mean value of each cluster, typed as the values.
        log_weights: fp32 `[B, H, T, C]`, natural logarithm of how many keys the centroid stands
            for; minus infinity where the tile reads the cluster itself or the cluster is empty.
        slope: fp32 `[B, H, D, D_v]`, mean product of what a key and its value exceed their centroid
            by: the value of a centroid then counts as `values[c] + query * scale @ slope`. None for
            0.
    """

    keys: Tensor
    values: Tensor
    log_weights: Tensor
    slope: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeResidual:
    """Correct rows by what a sparse call gets wrong for probes that stand for them.

    Behind every `rows - 1` rows of the plan order stands their probe, which reads what their tile
    reads; behind the last rows, which may be fewer, stands the last probe. What its exact output
    exceeds its sparse output by is added to the outputs of its rows, as far as probes of each head
    foretell each other (`corrections.foretold`).

    Attributes:
        queries: `[B, H, P, D]`, typed as the queries.
        outputs: fp32 `[B, H, P, D_v]`, attention of the probes over every video key.
        rows: positions of a probe and its rows.
        positions: positions of all of them, from the first on; text follows.
    """

    queries: Tensor
    outputs: Tensor
    rows: int
    positions: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ExactRows:
    """Correct video rows by a regression from a few whose exact outputs are known.

    See `corrections.repair`.

    Attributes:
        tokens: int64 `[B, H, M]`, the query tokens that are known.
        outputs: `[B, H, M, D_v]`, their attention over every valid key.
        first: first video token.
        count: video tokens; text stays as it is.
        whole: int64 `[B, H, R]`, tokens that a plan reads everything for and that stay as they
            are; they may come more than once. None for none.
    """

    tokens: Tensor
    outputs: Tensor
    first: int
    count: int
    whole: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SparsePlan:
    """Describe which keys each tile of query rows reads.

    Queries and keys are looked at in *plan order*: `order[i]` is the token at position `i`. A tile
    is `tile_rows` consecutive positions of the query order; it reads runs of consecutive positions
    of the key order. A plan is immutable, lives on the device, and has the same shapes for every
    call of one configuration, so building and running it needs no host synchronisation.

    Attributes:
        query_length: query tokens, padding included.
        key_length: key tokens, padding included.
        tile_rows: query rows of a tile.
        query_order: int32 `[B, H, query_length]`, or None for the given order. With a residual,
            `[B, H, query_length + P]`: `query_length + p` is probe `p`.
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
        residual: probes whose exact outputs correct their rows, or None. They are positions of the
            plan order like other queries, and count in its density and in `query_lengths`.
        exact_rows: rows whose exact outputs correct the others, or None.
        broken: bool `[B, H]`, heads that read everything because a query or key is not finite; None
            where the method does not look.
        is_full: known without looking at the device that every query reads every valid key.
        probe_density: what probes and exact rows of the plan's method took of every key, as a
            fraction of the pairs of the queries: half of a pair where a score was computed, all of
            it where a value was read too. No part of `density`.
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
    residual: ProbeResidual | None = None
    exact_rows: ExactRows | None = None
    broken: Tensor | None = None
    is_full: bool = False
    probe_density: float = 0.0

    def __post_init__(self) -> None:
        shape = tuple(self.run_starts.shape)
        if len(shape) != 4 or tuple(self.run_lengths.shape) != shape:
            raise ValueError(
                "run_starts and run_lengths must both be [B, H, T, R], "
                f"got {shape} and {tuple(self.run_lengths.shape)}"
            )
        tiles = count_tiles(self.positions, self.tile_rows)
        if shape[2] != tiles:
            raise ValueError(
                f"{self.positions} queries are {tiles} tiles of {self.tile_rows} rows, "
                f"but the runs describe {shape[2]}"
            )
        for name, length in (("query", self.positions), ("key", self.key_length)):
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
    def positions(self) -> int:
        """Positions of the query order: the queries, and the probes of a residual."""
        probes = 0 if self.residual is None else self.residual.queries.shape[2]
        return self.query_length + probes

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

    @classmethod
    def from_block_mask(
        cls,
        mask: Tensor,
        block: int | tuple[int, int] = TILE_ROWS,
        *,
        query_length: int | None = None,
        key_length: int | None = None,
    ) -> SparsePlan:
        """Build a plan from the blocks of keys that each block of queries reads.

        ```python
        plan = SparsePlan.from_block_mask(mask)           # bool [B, H, S / 128, S / 128]
        out = sparse_attention(query, key, value, plan)
        ```

        Args:
            mask: bool `[B, H, Tq, Tk]`, blocks in the order of the tokens.
            block: rows and keys of a block, one number or two; rows must be a multiple of 128 for
                the kernels, or divide 128 for the reference backend.
            query_length: queries, if the last block is not whole.
            key_length: keys, if the last block is not whole.

        Raises:
            TypeError: if `mask` is not bool.
            ValueError: if a shape or length does not fit.
        """
        rows, keys = (block, block) if isinstance(block, int) else block
        config.tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        if mask.dim() != 4:
            raise ValueError(f"mask must be [B, H, Tq, Tk], got {tuple(mask.shape)}")
        if rows < 1 or keys < 1 or (rows % TILE_ROWS and TILE_ROWS % rows):
            raise ValueError(
                f"a block must have a multiple or a divisor of {TILE_ROWS} rows, and some keys, "
                f"got {block}"
            )
        batch, heads, row_blocks, key_blocks = mask.shape
        queries = row_blocks * rows if query_length is None else query_length
        length = key_blocks * keys if key_length is None else key_length
        for name, given, count, size in (
            ("query_length", queries, row_blocks, rows),
            ("key_length", length, key_blocks, keys),
        ):
            if count_tiles(given, size) != count:
                raise ValueError(
                    f"{name} {given} is {count_tiles(given, size)} blocks of {size}, but the mask "
                    f"has {count}"
                )
        tile_rows = min(rows, TILE_ROWS)
        mask = mask.repeat_interleave(rows // tile_rows, dim=2)
        first = torch.arange(key_blocks, dtype=torch.int32, device=mask.device) * keys
        return cls.from_cluster_mask(
            mask[:, :, : count_tiles(queries, tile_rows)],
            (length - first).clamp(max=keys).expand(batch, heads, key_blocks),
            query_length=queries,
            key_length=length,
            tile_rows=tile_rows,
        ).ready()

    @classmethod
    def from_flex(
        cls, block_mask: Any, *, batch: int | None = None, heads: int | None = None
    ) -> SparsePlan:
        """Build a plan from a `BlockMask` of `torch.nn.attention.flex_attention`.

        A plan reads whole blocks: a block that the mask allows in part is refused, unless only
        the rows and keys past the ends of the sequences are missing. Checking that waits for the
        device. A `score_mod` is no part of a mask, and no part of the plan.

        Args:
            block_mask: from `create_block_mask` or `BlockMask.from_kv_blocks`.
            batch: batch size, if the mask has one item for all.
            heads: query heads, if the mask has one for all.

        Raises:
            TypeError: if it is no `BlockMask`.
            ValueError: if some block is read in part.
        """
        if not hasattr(block_mask, "kv_num_blocks"):
            raise TypeError(
                "block_mask must be a BlockMask of torch.nn.attention.flex_attention, got "
                f"{type(block_mask).__name__}"
            )
        counts, indices = block_mask.kv_num_blocks, block_mask.kv_indices
        rows, keys = block_mask.BLOCK_SIZE
        partial = _listed_blocks(counts, indices)
        mask = partial
        if block_mask.full_kv_num_blocks is not None:
            mask = partial | _listed_blocks(
                block_mask.full_kv_num_blocks, block_mask.full_kv_indices
            )
        queries, length = block_mask.seq_lengths
        _refuse_partial_blocks(block_mask.mask_mod, partial, (rows, keys), (queries, length))
        shape = (batch or mask.shape[0], heads or mask.shape[1])
        return cls.from_block_mask(
            mask.expand(*shape, *mask.shape[2:]),
            (rows, keys),
            query_length=queries,
            key_length=length,
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

    def part(self, batch: slice, heads: slice, key_heads: slice, key_head_count: int) -> SparsePlan:
        """Return the plan of some batch items and heads, without corrections of rows.

        Args:
            batch: batch items.
            heads: query heads.
            key_heads: the key heads that these query heads share.
            key_head_count: all key heads.
        """

        def of_keys(x: Tensor) -> Tensor:
            return match_heads(x, key_head_count)[batch, key_heads]

        tile_order = self.tile_order
        if tile_order is not None:
            # Tiles are numbered from the first of the part.
            first = (batch.start * self.heads + heads.start) * self.tiles
            tile_order = tile_order[batch, heads] - first
        summary = self.summary
        if summary is not None:
            summary = KeySummary(
                keys=of_keys(summary.keys),
                values=of_keys(summary.values),
                log_weights=summary.log_weights[batch, heads],
            )
        return replace(
            self,
            query_order=None if self.query_order is None else self.query_order[batch, heads],
            key_order=None if self.key_order is None else of_keys(self.key_order),
            run_starts=self.run_starts[batch, heads],
            run_lengths=self.run_lengths[batch, heads],
            query_lengths=None if self.query_lengths is None else self.query_lengths[batch],
            key_lengths=None if self.key_lengths is None else self.key_lengths[batch],
            tile_order=tile_order,
            summary=summary,
            residual=None,
            exact_rows=None,
            query_length=self.positions,
            broken=None,
        )

    def tile_rows_valid(self) -> Tensor:
        """Count the valid query rows of each tile: int64 `[B or 1, T]`."""
        valid = self.query_lengths
        if valid is None:
            valid = torch.full((1,), self.positions, device=self.device)
        first = torch.arange(self.tiles, device=self.device) * self.tile_rows
        return (valid.long()[:, None] - first).clamp(min=0, max=self.tile_rows)

    def density(self) -> Tensor:
        """Return the query-key pairs computed exactly, as a fraction of all valid pairs.

        What the probes of a residual read counts as computed, beside the pairs of the queries.

        Returns:
            fp32 `[B, H]` on the plan's device.
        """
        rows = self.tile_rows_valid()
        pairs = (self.run_lengths.sum(dim=-1, dtype=torch.int64) * rows[:, None]).sum(dim=-1)
        keys: Tensor | int = self.key_length
        if self.key_lengths is not None:
            keys = self.key_lengths.long()[:, None]
        queries = rows.sum(dim=-1, keepdim=True) - (self.positions - self.query_length)
        return (pairs.double() / (queries * keys)).float()

    def __repr__(self) -> str:
        """Return a few readable lines; waits for the device."""
        return "\n  ".join([f"SparsePlan on {self.device}", *self._facts()])

    def _repr_html_(self) -> str:
        """Return what `repr` says, as a list for a notebook."""
        items = "".join(f"<li>{html.escape(fact)}</li>" for fact in self._facts())
        return f"<b>SparsePlan</b> on {html.escape(str(self.device))}<ul>{items}</ul>"

    def _facts(self) -> list[str]:
        """Return size, density, order and extras, a line each."""
        facts = [
            f"{self.batch} x {self.heads} heads, {self.query_length:,} queries in {self.tiles} "
            f"tiles of {self.tile_rows}, {self.key_length:,} keys"
        ]
        if self.is_full:
            facts.append("every query reads every valid key")
        elif self.device.type != "meta":
            density = self.density()
            low, mean, high = (float(x) for x in (density.min(), density.mean(), density.max()))
            runs = (self.run_lengths > 0).sum(dim=-1).float().mean()
            facts.append(
                f"density {mean:.1%} ({low:.1%} to {high:.1%} over heads), "
                f"{float(runs):.1f} runs a tile"
            )
        orders = {"queries": self.query_order, "keys": self.key_order}
        moved = [name for name, order in orders.items() if order is not None]
        facts.append(f"{' and '.join(moved)} reordered" if moved else "tokens in the given order")
        if self.summary is not None:
            facts.append(f"{self.summary.keys.shape[2]:,} centroids stand in for unread keys")
        if self.residual is not None:
            facts.append(f"{self.residual.queries.shape[2]:,} probes correct their rows")
        if self.exact_rows is not None:
            facts.append(
                f"{self.exact_rows.tokens.shape[2]:,} exact rows a head correct the others"
            )
        if self.probe_density:
            facts.append(f"probes took {self.probe_density:.1%} more")
        return facts

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
        mask = tiles.repeat_interleave(self.tile_rows, dim=2)[:, :, : self.positions]
        if self.key_order is not None:
            order = match_heads(self.key_order, self.heads).long()
            mask = torch.zeros_like(mask).scatter_(-1, order[:, :, None].expand_as(mask), mask)
        if self.query_order is not None:
            order = self.query_order.long()[..., None]
            mask = torch.zeros_like(mask).scatter_(2, order.expand_as(mask), mask)
        return mask[:, :, : self.query_length]


def _listed_blocks(counts: Tensor, indices: Tensor) -> Tensor:
    """Return FlexAttention's lists of blocks as a mask: bool `[B, H, Tq, Tk]`."""
    blocks = indices.shape[-1]
    place = torch.arange(blocks, device=indices.device)
    # Entries past the count of a row say nothing; they go to a spare column.
    target = torch.where(place < counts[..., None], indices, blocks).long()
    mask = torch.zeros((*indices.shape[:-1], blocks + 1), dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, target, True)[..., :blocks]


def _refuse_partial_blocks(
    mask_mod: Any, partial: Tensor, block: tuple[int, int], lengths: tuple[int, int]
) -> None:
    """Raise ValueError if `mask_mod` forbids a pair inside one of the `partial` blocks."""
    (rows, keys), (queries, length) = block, lengths
    for b, h, t, j in partial.nonzero().tolist():
        item, head = (torch.tensor(n, device=partial.device) for n in (b, h))
        row = torch.arange(t * rows, min((t + 1) * rows, queries), device=partial.device)
        key = torch.arange(j * keys, min((j + 1) * keys, length), device=partial.device)
        allowed = mask_mod(item, head, row[:, None], key[None])
        if not bool(torch.as_tensor(allowed).all()):
            raise ValueError(
                f"the mask allows block ({t}, {j}) of item {b}, head {h}, in part, and a plan "
                f"reads whole blocks of {rows} queries and {keys} keys; make the mask of whole "
                "blocks, or choose a BLOCK_SIZE at which it is"
            )
