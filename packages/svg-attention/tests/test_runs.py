from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from svg_attention.planning.runs import cluster_runs, merge_clusters, round_runs
from svg_attention.planning.segments import merge_segments


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


def test_cluster_runs_of_full_tiles_read_every_cluster_and_the_tail_of_their_batch_item() -> None:
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
def test_round_runs_only_adds_real_keys_and_counts_none_twice(seed: int, multiple: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    limit = 150 + seed
    cuts = torch.randperm(limit, generator=draw)[:24].sort().values
    starts, lengths = cuts[0::2], cuts[1::2] - cuts[0::2]
    new_starts, new_lengths = round_runs(
        starts.int().view(1, 1, 1, -1),
        lengths.int().view(1, 1, 1, -1),
        multiple=multiple,
        limit=torch.tensor([limit]),
    )
    new_starts, new_lengths = new_starts.flatten(0, 2), new_lengths.flatten(0, 2)
    before, after = rows_of(starts, lengths), rows_of(new_starts[0], new_lengths[0])
    assert set(before) <= set(after) <= set(range(limit))
    used = new_lengths[0][new_lengths[0] > 0]
    assert (used[:-1] % multiple == 0).all()
    end = int(new_starts[0][len(used) - 1] + used[-1])
    assert used[-1] % multiple == 0 or end == limit
    if multiple == 1:
        assert before == after


def test_round_runs_leaves_a_tile_without_runs_empty() -> None:
    empty = torch.zeros(1, 1, 1, 4, dtype=torch.int32)
    starts, lengths = round_runs(empty, empty, multiple=8, limit=torch.tensor([50]))
    assert not lengths.any()
    assert not starts.any()


def test_merge_segments_of_no_rows_neither_make_nor_break_a_run() -> None:
    starts, ends = torch.tensor([0, 4, 4, 9]), torch.tensor([4, 4, 9, 9])
    kept = torch.tensor([True, False, True, True])
    first, length = merge_segments(starts, ends, kept, slots=2)
    assert first.tolist() == [0, 0]
    assert length.tolist() == [9, 0]


def rows_read(starts: Tensor, lengths: Tensor, rows: int) -> Tensor:
    """Return which rows the runs `[..., R]` cover, bool `[..., rows]`."""
    place = torch.arange(rows, device=starts.device)
    first, end = starts[..., None], (starts + lengths)[..., None]
    return ((place >= first) & (place < end)).any(dim=-2)


def test_merge_clusters_covers_the_chosen_clusters_and_nothing_else(planner, device, generator):
    sizes = torch.randint(0, 9, (2, 2, 40), generator=generator, device=device).int()
    mask = torch.rand((2, 2, 3, 40), generator=generator, device=device) < 0.4
    tail = torch.tensor([5, 0], device=device)
    ends = torch.cat([sizes.cumsum(-1), (sizes.sum(-1) + tail[:, None])[..., None]], -1).int()
    full = torch.zeros(2, 3, dtype=torch.bool, device=device)
    full[0, 2] = True
    starts, lengths = merge_clusters(mask, ends, full=full, backend=planner)
    assert starts.shape == lengths.shape == (2, 2, 3, 21)
    rows = int(ends.max())
    covered = rows_read(starts, lengths, rows)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 3))).tolist():
        owner = torch.repeat_interleave(torch.arange(40), sizes[b, h].cpu()).to(device)
        want = torch.zeros(rows, dtype=torch.bool, device=device)
        want[: len(owner)] = mask[b, h, t][owner] | full[b, t]
        want[len(owner) : len(owner) + int(tail[b])] = True
        assert torch.equal(covered[b, h, t], want)
        used = lengths[b, h, t] > 0
        count = int(used.sum())
        assert used[:count].all()
        ends_of_runs = (starts + lengths)[b, h, t, :count]
        assert (starts[b, h, t, 1:count] > ends_of_runs[:-1]).all(), "touching runs are merged"
        assert (starts[b, h, t, count:] == 0).all()


@pytest.mark.parametrize("multiple", [1, 8])
def test_round_runs_reads_more_and_nothing_twice(planner, device, generator, multiple):
    cuts = torch.rand(2, 2, 3, 100, generator=generator, device=device).argsort(-1)[..., :16]
    cuts = cuts.sort(-1).values.int()
    starts, lengths = cuts[..., 0::2].clone(), cuts[..., 1::2] - cuts[..., 0::2]
    lengths[0, 0, 1] = starts[0, 0, 1] = 0
    limit = torch.tensor([100, 101], dtype=torch.int32, device=device)
    new_starts, new_lengths = round_runs(
        starts, lengths, multiple=multiple, limit=limit, backend=planner
    )
    old, new = rows_read(starts, lengths, 101), rows_read(new_starts, new_lengths, 101)
    assert (new | ~old).all()
    assert torch.equal(new.sum(-1), new_lengths.sum(-1)), "no row is in two runs"
    ends = new_starts + new_lengths
    reach = limit[:, None, None, None]
    assert (ends <= reach).all()
    assert ((new_lengths % multiple == 0) | (ends == reach)).all()
    # Only rows within `multiple` of what was asked for are added.
    near = torch.nn.functional.max_pool1d(
        old.float().flatten(0, 2)[:, None], 2 * multiple - 1, 1, multiple - 1
    )
    assert (near.view_as(old).bool() | ~new).all()


def test_runs_name_wrong_arguments():
    sizes, mask = torch.ones(1, 2, 5).int(), torch.ones(1, 2, 3, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="ends must be"):
        merge_clusters(mask, sizes)
    with pytest.raises(ValueError, match="full must be"):
        merge_clusters(mask, torch.ones(1, 2, 6).int(), full=mask[..., 0, 0])
    with pytest.raises(ValueError, match="limit must be"):
        round_runs(sizes[None], sizes[None], multiple=8, limit=sizes[0, 0])
