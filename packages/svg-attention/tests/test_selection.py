from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from svg_attention.planning.selection import keep_budget, keep_top_p


def each(x: Tensor) -> itertools.product:
    return itertools.product(*(range(size) for size in x.shape[:-1]))


def clusters(generator, device, *, batch=1, heads=2, tiles=3, count=30, ties=False):
    shape = (batch, heads, tiles, count)
    mass = torch.rand(shape, generator=generator, device=device) ** 4
    if ties:
        mass = (mass * 4).floor() + 1
    mass = mass / mass.sum(-1, keepdim=True)
    sizes = torch.randint(0, 9, (batch, heads, count), generator=generator, device=device)
    sizes[..., 3] = 40
    return mass, sizes.int()


def ranked(priority, sizes):
    """Yield (index, clusters by falling priority, empty ones left out) of every tile."""
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in priority.shape[:3])).tolist():
        row, size = priority[b, h, t].tolist(), sizes[b, h].tolist()
        order = sorted((c for c in range(len(row)) if size[c]), key=lambda c: (-row[c], c))
        yield (b, h, t), order, size


def by_mass_per_key(
    mass: Tensor, sizes: Tensor, *, top_p: float, min_keep: float = 0.0, backend: str = "auto"
) -> Tensor:
    """Rank by mass per key, as SVG2 does."""
    priority = mass / sizes.clamp(min=1)[:, :, None]
    floor = int(min_keep * mass.shape[-1])
    return keep_top_p(priority, mass, sizes.int(), top_p=top_p, min_clusters=floor, backend=backend)


def brute_top_p(mass: list[float], sizes: list[int], top_p: float, floor: int) -> list[bool]:
    """Take clusters of falling mass per key until they reach the share, then up to the floor."""
    worth = [m / n if n else -1.0 for m, n in zip(mass, sizes, strict=True)]
    ranked = sorted(range(len(mass)), key=lambda j: (-worth[j], j))
    kept, total = set(), 0.0
    for rank, j in enumerate(ranked):
        if rank == 0 or total < top_p or rank < floor:
            kept.add(j)
        total += mass[j]
    return [j in kept and sizes[j] > 0 for j in range(len(mass))]


@pytest.mark.parametrize("top_p", [0.001, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("min_keep", [0.0, 0.3, 1.0])
def test_keep_top_p_equals_brute_force(top_p: float, min_keep: float) -> None:
    draw = torch.Generator().manual_seed(1)
    sizes = torch.tensor([0, 1, 2, 4])[
        torch.randint(0, 4, (2, 3, 9), generator=draw)
    ]  # Some empty.
    weights = torch.randint(1, 6, (2, 3, 4, 9), generator=draw).double()  # Many ties.
    weights = weights * (sizes > 0)[:, :, None]
    # Shares with a denominator of a power of two sum without rounding.
    mass = (weights / 64).float()
    kept = by_mass_per_key(mass, sizes, top_p=top_p, min_keep=min_keep)
    floor = int(min_keep * 9)
    for b, h, t in each(kept):
        expected = brute_top_p(mass[b, h, t].tolist(), sizes[b, h].tolist(), top_p, floor)
        assert kept[b, h, t].tolist() == expected


def test_keep_top_p_keeps_the_cluster_that_crosses_the_share_and_not_the_next() -> None:
    mass = torch.tensor([0.125, 0.5, 0.25, 0.125]).view(1, 1, 1, 4)
    sizes = torch.ones(1, 1, 4, dtype=torch.int32)
    crossing = by_mass_per_key(mass, sizes, top_p=0.6)
    assert crossing.flatten().tolist() == [False, True, True, False]
    exact = by_mass_per_key(mass, sizes, top_p=0.5)
    assert exact.flatten().tolist() == [False, True, False, False]


def test_keep_top_p_by_mass_per_key_costs_no_more_keys_than_by_mass() -> None:
    mass = torch.tensor([0.5, 0.25, 0.25]).view(1, 1, 1, 3)
    sizes = torch.tensor([[[80, 5, 5]]])
    assert by_mass_per_key(mass, sizes, top_p=0.4).flatten().tolist() == [False, True, True]


def test_keep_top_p_and_keep_budget_keep_one_cluster_at_least() -> None:
    ones = torch.ones(1, 1, 2, 1)
    assert by_mass_per_key(ones, torch.tensor([[[7]]]), top_p=0.01).all()
    assert keep_budget(ones, torch.tensor([[[7]]]).int(), torch.zeros(1, 1, 2)).all()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("top_p", "floor"), [(0.9003, 4), (0.3003, 1), (1e-6, 1), (0.9993, 30)])
def test_keep_top_p_keeps_the_shortest_prefix(planner, device, generator, ties, top_p, floor):
    mass, sizes = clusters(generator, device, ties=ties)
    priority = mass / sizes.clamp(min=1)[:, :, None]
    kept = keep_top_p(priority, mass, sizes, top_p=top_p, min_clusters=floor, backend=planner)
    for place, order, _ in ranked(priority, sizes):
        want, total = set(), 0.0
        for rank, c in enumerate(order):
            if rank < max(floor, 1) or total < top_p:
                want.add(c)
            total += mass[(*place, c)].item()
        assert {c for c, k in enumerate(kept[place].tolist()) if k} == want


@pytest.mark.parametrize("ties", [False, True])
def test_keep_budget_fills_the_budget_and_does_not_pass_it(planner, device, generator, ties):
    priority, sizes = clusters(generator, device, ties=ties)
    budget = torch.tensor([0.0, 21.0, 90.0], device=device).expand(1, 2, 3)
    kept = keep_budget(priority, sizes, budget, backend=planner)
    for place, order, size in ranked(priority, sizes):
        room = budget[place].item()
        want = []
        for c in order:
            if want and sum(size[w] for w in want) + size[c] > room:
                break
            want.append(c)
            if sum(size[w] for w in want) > room:
                break
        for _ in range(2):
            spare = room - sum(size[w] for w in want)
            for c in [c for c in order if c not in want and size[c] <= spare]:
                if size[c] > spare:
                    break
                want.append(c)
                spare -= size[c]
        assert {c for c, k in enumerate(kept[place].tolist()) if k} == set(want)


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
def test_keep_budget_equals_brute_force_and_is_not_exceeded(budget: float) -> None:
    draw = torch.Generator().manual_seed(2)
    sizes = torch.randint(0, 9, (2, 2, 10), generator=draw)
    priority = torch.randint(0, 6, (2, 2, 5, 10), generator=draw).float()
    kept = keep_budget(priority, sizes.int(), torch.full((2, 2, 5), budget))
    for b, h, t in each(kept):
        counts = sizes[b, h].tolist()
        expected = brute_budget(priority[b, h, t].tolist(), counts, budget)
        assert kept[b, h, t].tolist() == expected
        first = max((j for j in range(10) if counts[j]), key=lambda j: (priority[b, h, t, j], -j))
        assert sum(itertools.compress(counts, expected)) <= max(budget, counts[first])
    if budget == 1000.0:
        assert torch.equal(kept, (sizes > 0)[:, :, None].expand_as(kept))


def test_keep_top_p_and_keep_budget_agree_at_the_size_of_a_model(device, generator, planner):
    mass, sizes = clusters(generator, device, batch=1, heads=1, tiles=2, count=1000)
    priority = mass / sizes.clamp(min=1)[:, :, None]
    budget = torch.full((1, 1, 2), 1500.0, device=device)
    for function, arguments in (
        (keep_top_p, {"mass": mass, "top_p": 0.9, "min_clusters": 100}),
        (keep_budget, {"budget": budget}),
    ):
        got = function(priority, sizes=sizes, backend=planner, **arguments)
        want = function(priority, sizes=sizes, backend="reference", **arguments)
        # A sum in another order may move the cluster that crosses the threshold.
        assert (got != want).sum() <= 2


def test_selection_names_wrong_arguments(generator):
    mass, sizes = clusters(generator, torch.device("cpu"))
    with pytest.raises(TypeError, match="sizes must be int32"):
        keep_top_p(mass, mass, sizes.long(), top_p=0.5)
    with pytest.raises(ValueError, match="sizes must be"):
        keep_budget(mass, sizes[..., :-1], mass[..., 0])
    with pytest.raises(ValueError, match="budget must be"):
        keep_budget(mass, sizes, mass[0, ..., 0])
    with pytest.raises(ValueError, match="backend must be"):
        keep_top_p(mass, mass, sizes, top_p=0.5, backend="cuda")
