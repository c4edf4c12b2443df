from __future__ import annotations

import pytest
import torch

from svg_attention.planning.dealing import counts_of_heads, deal_heads


def imbalance(cost: torch.Tensor, order: torch.Tensor, ranks: int) -> float:
    """Return the most that a process has, over the mean."""
    loads = [part.sum() for part in cost[order].split(counts_of_heads(len(cost), ranks))]
    return float(max(loads) * ranks / cost.sum())


@pytest.mark.parametrize(("heads", "ranks"), [(1, 1), (2, 4), (12, 4), (13, 4), (40, 4), (24, 8)])
def test_deal_heads_gives_each_process_its_number(heads, ranks, planner, device, generator):
    cost = torch.rand(heads, generator=generator, device=device)
    order = deal_heads(cost, ranks, backend=planner)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(heads))
    assert counts_of_heads(heads, ranks) == [
        len(x) for x in torch.arange(heads).tensor_split(ranks)
    ]


def test_deal_heads_is_the_longest_processing_time_first(planner, device):
    cost = torch.tensor([1.0, 8.0, 2.0, 2.0, 7.0, 1.0], device=device)
    # 8 | 7, then 2 to the second, 2 to the first (8 < 9), 1 to the second, 1 to the first.
    assert deal_heads(cost, 2, backend=planner).tolist() == [1, 3, 5, 4, 2, 0]


@pytest.mark.parametrize(("heads", "ranks"), [(40, 2), (40, 4), (24, 4)])
def test_deal_heads_balances_skewed_heads(heads, ranks, planner, device, generator):
    worst = plain = 1.0
    for _ in range(5):
        # Neighbours alike, as heads that fill a GPU by their number would be at worst.
        cost = (0.6 + torch.rand(heads, generator=generator, device=device) ** 3).sort().values
        order = deal_heads(cost, ranks, backend=planner)
        worst = max(worst, imbalance(cost, order, ranks))
        plain = max(plain, imbalance(cost, torch.arange(heads, device=device), ranks))
    assert plain > 1.25
    assert worst <= 1.05


def test_deal_heads_takes_any_number(planner, device):
    cost = torch.tensor([torch.nan, torch.inf, 0.0, 1.0], device=device)
    assert sorted(deal_heads(cost, 2, backend=planner).tolist()) == [0, 1, 2, 3]
    assert deal_heads(torch.zeros(0, device=device), 2, backend=planner).tolist() == []


def test_deal_heads_refuses_other_costs():
    with pytest.raises(ValueError, match="for each head"):
        deal_heads(torch.zeros(2, 3), 2)
    with pytest.raises(TypeError, match="fp32"):
        deal_heads(torch.zeros(3, dtype=torch.float64), 2)
    with pytest.raises(ValueError, match="at least one"):
        deal_heads(torch.zeros(3), 0)
