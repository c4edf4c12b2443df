from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from svg_attention import TokenLayout
from svg_attention.methods import selection
from svg_attention.methods.selection import (
    estimated_mass,
    keep_budget,
    keep_top_p,
    key_budget,
    probe_counts,
    probe_means,
    tile_average,
)


def each(x: Tensor) -> itertools.product:
    return itertools.product(*(range(size) for size in x.shape[:-1]))


def order_of(query: Tensor, rows: int) -> Tensor:
    """Return the first rows of every head in the given order."""
    return torch.arange(rows, dtype=torch.int32).expand(*query.shape[:2], rows)


def brute_top_p(mass: list[float], sizes: list[int], top_p: float, floor: int) -> list[bool]:
    """Take clusters of falling mass per key until they reach the share, then up to the floor."""
    worth = [m / n if n else -1.0 for m, n in zip(mass, sizes, strict=True)]
    ranked = sorted(range(len(mass)), key=lambda j: (-worth[j], j))
    kept, total = set(), 0.0
    for rank, j in enumerate(ranked):
        if rank == 0 or top_p >= 1.0 or total < top_p or rank < floor:
            kept.add(j)
        total += mass[j]
    return [j in kept and sizes[j] > 0 for j in range(len(mass))]


@pytest.mark.parametrize("top_p", [0.001, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("min_keep", [0.0, 0.3, 1.0])
def test_top_p_equals_brute_force(top_p: float, min_keep: float) -> None:
    draw = torch.Generator().manual_seed(1)
    sizes = torch.tensor([0, 1, 2, 4])[
        torch.randint(0, 4, (2, 3, 9), generator=draw)
    ]  # Some empty.
    weights = torch.randint(1, 6, (2, 3, 4, 9), generator=draw).double()  # Many ties.
    weights = weights * (sizes > 0)[:, :, None]
    # Shares with a denominator of a power of two sum without rounding.
    mass = (weights / 64).float()
    kept = keep_top_p(mass, sizes, top_p=top_p, min_keep=min_keep)
    floor = int(min_keep * 9)
    for b, h, t in each(kept):
        expected = brute_top_p(mass[b, h, t].tolist(), sizes[b, h].tolist(), top_p, floor)
        assert kept[b, h, t].tolist() == expected


def test_the_cluster_that_crosses_the_share_is_kept_and_the_next_is_not() -> None:
    mass = torch.tensor([0.125, 0.5, 0.25, 0.125]).view(1, 1, 1, 4)
    sizes = torch.ones(1, 1, 4, dtype=torch.int32)
    crossing = keep_top_p(mass, sizes, top_p=0.6)
    assert crossing.flatten().tolist() == [False, True, True, False]
    exact = keep_top_p(mass, sizes, top_p=0.5)
    assert exact.flatten().tolist() == [False, True, False, False]


def test_the_same_share_of_the_mass_costs_no_more_keys_than_ranking_by_mass() -> None:
    mass = torch.tensor([0.5, 0.25, 0.25]).view(1, 1, 1, 3)
    sizes = torch.tensor([[[80, 5, 5]]])
    assert keep_top_p(mass, sizes, top_p=0.4).flatten().tolist() == [False, True, True]


def test_share_of_one_keeps_every_cluster_however_light() -> None:
    mass = torch.tensor([1.0, 1e-30, 0.0, 0.0]).view(1, 1, 1, 4)
    sizes = torch.tensor([[[3, 2, 1, 0]]])
    assert keep_top_p(mass, sizes, top_p=1.0).flatten().tolist() == [True, True, True, False]


def test_one_cluster_is_always_kept() -> None:
    ones = torch.ones(1, 1, 2, 1)
    assert keep_top_p(ones, torch.tensor([[[7]]]), top_p=0.01).all()
    assert keep_budget(ones, torch.tensor([[[7]]]), torch.zeros(1)).all()


def test_estimated_mass_is_the_softmax_over_keys_at_their_centroids() -> None:
    means, centroids = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 4, 8)
    sizes = torch.tensor([[[3, 0, 1, 5], [2, 2, 2, 0]]])
    mass = estimated_mass(means, centroids, sizes, 0.3, 3 * 128, 128)
    for h in range(2):
        keys = centroids[0, h].repeat_interleave(sizes[0, h], dim=0)
        share = torch.softmax(means[0, h] @ keys.T * 0.3, dim=-1)
        owner = torch.arange(4).repeat_interleave(sizes[0, h])
        expected = torch.zeros(3, 4).index_add_(1, owner, share)
        assert torch.allclose(mass[0, h], expected, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 2**26])
def test_a_tile_averages_the_shares_of_its_probes(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "MASS_LOGITS", limit)
    query, centroids = torch.randn(2, 2, 300, 8), torch.randn(2, 2, 5, 8)
    sizes = torch.randint(1, 9, (2, 2, 5))
    mass = estimated_mass(
        probe_means(query, order_of(query, 290), 1), centroids, sizes, 0.7, 290, 1
    )
    weight = sizes.float().log()[:, :, None]
    rows = torch.softmax(query @ centroids.mT * 0.7 + weight, dim=-1)[:, :, :290]
    assert mass.shape == (2, 2, 3, 5)
    for tile, part in enumerate(rows.split(128, dim=2)):
        assert torch.allclose(mass[:, :, tile], part.mean(dim=2), atol=1e-6)


def test_finer_probes_see_what_their_mean_hides() -> None:
    # Two kinds of queries that cancel in the mean, each with a cluster of its own.
    query = torch.tensor([9.0, -9.0]).repeat_interleave(64)[:, None].expand(128, 4)[None, None]
    centroids = torch.tensor([1.0, -1.0, 0.0])[:, None].expand(3, 4)[None, None]
    sizes = torch.tensor([[[8, 8, 8]]])

    def mass(rows: int) -> torch.Tensor:
        means = probe_means(query, order_of(query, 128), rows)
        return estimated_mass(means, centroids, sizes, 0.5, 128, rows)[0, 0, 0]

    assert torch.allclose(mass(128), torch.full((3,), 1 / 3))
    assert torch.allclose(mass(64), torch.tensor([0.5, 0.5, 0.0]), atol=1e-6)


def test_probe_means_average_a_partial_last_probe_over_its_own_rows() -> None:
    query = torch.randn(1, 2, 300, 4)
    means = probe_means(query, order_of(query, 290), 64)
    assert means.shape == (1, 2, 6, 4)
    assert torch.allclose(means[:, :, 1], query[:, :, 64:128].mean(dim=2), atol=1e-6)
    assert torch.allclose(means[:, :, 4], query[:, :, 256:290].mean(dim=2), atol=1e-6)
    assert (means[:, :, 5] == 0).all()
    counts = probe_counts(290, 64, query.device)
    assert counts.tolist() == [64, 64, 64, 64, 34, 0]
    whole = tile_average(means, 290, 64)
    assert torch.allclose(whole, probe_means(query, order_of(query, 290), 128), atol=1e-6)
    backwards = probe_means(query.flip(2), order_of(query, 300).flip(2)[:, :, :290], 64)
    assert torch.equal(backwards, means)


def brute_budget(priority: list[float], sizes: list[int], budget: float) -> list[bool]:
    """Take a prefix that fits; twice, of what alone fits the rest, a prefix that fits."""
    ranked = sorted((j for j in range(len(sizes)) if sizes[j]), key=lambda j: (-priority[j], j))
    kept = set(ranked[:1])
    for count in range(1, len(ranked) + 1):
        if sum(sizes[j] for j in ranked[:count]) <= budget:
            kept = set(ranked[:count])
    for _ in range(2):
        spare = budget - sum(sizes[j] for j in kept)
        fits = [j for j in ranked if j not in kept and sizes[j] <= spare]
        for count in range(len(fits), 0, -1):
            if sum(sizes[j] for j in fits[:count]) <= spare:
                kept |= set(fits[:count])
                break
    return [j in kept for j in range(len(sizes))]


@pytest.mark.parametrize("budget", [0.0, 3.0, 11.5, 20.0, 1000.0])
def test_budget_equals_brute_force_and_is_not_exceeded(budget: float) -> None:
    draw = torch.Generator().manual_seed(2)
    sizes = torch.randint(0, 9, (2, 2, 10), generator=draw)
    priority = torch.randint(0, 6, (2, 2, 5, 10), generator=draw).float()
    kept = keep_budget(priority, sizes, torch.tensor(budget))
    for b, h, t in each(kept):
        counts = sizes[b, h].tolist()
        expected = brute_budget(priority[b, h, t].tolist(), counts, budget)
        assert kept[b, h, t].tolist() == expected
        first = max((j for j in range(10) if counts[j]), key=lambda j: (priority[b, h, t, j], -j))
        assert sum(itertools.compress(counts, expected)) <= max(budget, counts[first])
    if budget == 1000.0:
        assert torch.equal(kept, (sizes > 0)[:, :, None].expand_as(kept))


@pytest.mark.parametrize(("grid", "text"), [((4, 8, 16), 0), ((5, 9, 11), 60), ((4, 8, 16), 60)])
def test_key_budget_gives_the_density_asked_for(grid: tuple[int, int, int], text: int) -> None:
    layout = TokenLayout(grid=grid, text_tokens=text)
    video, tokens = layout.video_tokens, layout.tokens
    like = torch.empty(0)
    budget = float(key_budget(layout, torch.tensor([text]), 0.5, like))
    assert budget == float(key_budget(layout, None, 0.5, like))
    pairs = 0.0
    for first in range(0, tokens, 128):
        rows = min(128, tokens - first)
        pairs += rows * (tokens if first + rows > video else budget + text)
    assert pairs / tokens**2 == pytest.approx(0.5, abs=1e-9)
    assert 0.0 <= float(key_budget(layout, torch.tensor([text]), 1e-6, like)) < 1e-3
