from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from svg_attention.runs import cluster_runs, merge_segments, round_runs


def rows_of(starts: Tensor, lengths: Tensor) -> list[int]:
    """Write out the rows of one list of runs, checking that it is well formed."""
    rows: list[int] = []
    used = (lengths > 0).tolist()
    assert used == sorted(used, reverse=True), "used slots come first"
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        if length:
            assert not rows or start > rows[-1], "runs are ascending and disjoint"
            rows.extend(range(start, start + length))
    return rows


@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize("seed", range(6))
def test_cluster_runs_read_exactly_the_kept_clusters(seed: int, tail: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 9, (2, 3, 11), generator=draw) * (
        torch.rand(2, 3, 11, generator=draw) < 0.7
    )
    mask = torch.rand(2, 3, 4, 11, generator=draw) < 0.5
    starts, lengths = cluster_runs(mask, sizes, tail=tail)
    assert starts.dtype == lengths.dtype == torch.int32
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)):
        first = 0
        expected = []
        for size, kept in zip(sizes[b, h].tolist(), mask[b, h, t].tolist(), strict=True):
            expected += list(range(first, first + size)) if kept else []
            first += size
        expected += list(range(first, first + tail))
        assert rows_of(starts[b, h, t], lengths[b, h, t]) == expected
        merged = int((lengths[b, h, t] > 0).sum())
        gaps = sum(late - early > 1 for early, late in itertools.pairwise(expected))
        assert merged == (gaps + 1 if expected else 0), "neighbours are merged"


def test_cluster_runs_fit_their_slots_in_the_worst_case() -> None:
    for clusters in (1, 2, 5, 6):
        sizes = torch.full((1, 1, clusters), 3)
        for phase in (0, 1):
            mask = (torch.arange(clusters) % 2 == phase).view(1, 1, 1, -1)
            starts, lengths = cluster_runs(mask, sizes, tail=4)
            kept = 3 * int(mask.sum()) + 4
            assert len(rows_of(starts[0, 0, 0], lengths[0, 0, 0])) == kept


def test_full_tiles_read_every_cluster_and_the_tail_of_their_batch_item() -> None:
    sizes = torch.tensor([[[3, 0, 4]], [[1, 5, 1]]])
    mask = torch.zeros(2, 1, 2, 3, dtype=torch.bool)
    full = torch.tensor([[[False, True]], [[False, True]]])
    starts, lengths = cluster_runs(mask, sizes, tail=torch.tensor([2, 0]), full=full)
    assert rows_of(starts[0, 0, 0], lengths[0, 0, 0]) == [7, 8]
    assert rows_of(starts[0, 0, 1], lengths[0, 0, 1]) == list(range(9))
    assert rows_of(starts[1, 0, 0], lengths[1, 0, 0]) == []
    assert rows_of(starts[1, 0, 1], lengths[1, 0, 1]) == list(range(7))


@pytest.mark.parametrize("multiple", [1, 8, 16])
@pytest.mark.parametrize("seed", range(8))
def test_rounding_only_adds_real_keys_and_counts_none_twice(seed: int, multiple: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    limit = 150 + seed
    cuts = torch.randperm(limit, generator=draw)[:24].sort().values
    starts, lengths = cuts[0::2], cuts[1::2] - cuts[0::2]
    new_starts, new_lengths = round_runs(
        starts.int()[None], lengths.int()[None], multiple=multiple, limit=torch.tensor([[limit]])
    )
    before, after = rows_of(starts, lengths), rows_of(new_starts[0], new_lengths[0])
    assert set(before) <= set(after) <= set(range(limit))
    used = new_lengths[0][new_lengths[0] > 0]
    assert (used[:-1] % multiple == 0).all()
    end = int(new_starts[0][len(used) - 1] + used[-1])
    assert used[-1] % multiple == 0 or end == limit
    if multiple == 1:
        assert before == after


def test_rounding_a_tile_without_runs_leaves_it_empty() -> None:
    empty = torch.zeros(1, 4, dtype=torch.int32)
    starts, lengths = round_runs(empty, empty, multiple=8, limit=torch.tensor([[50]]))
    assert not lengths.any()
    assert not starts.any()


def test_empty_segments_neither_make_nor_break_a_run() -> None:
    starts, ends = torch.tensor([0, 4, 4, 9]), torch.tensor([4, 4, 9, 9])
    kept = torch.tensor([True, False, True, True])
    first, length = merge_segments(starts, ends, kept, slots=2)
    assert first.tolist() == [0, 0]
    assert length.tolist() == [9, 0]
