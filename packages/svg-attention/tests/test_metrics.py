from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from svg_attention import SparsePlan, density, metrics, needed_density, recall


@pytest.mark.parametrize("limit", [1, 2**26])
def test_recall_equals_the_attention_under_the_mask(
    limit: int, random_plan: Callable[..., SparsePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "METRIC_LOGITS", limit)
    query, key = torch.randn(2, 4, 200, 16), torch.randn(2, 2, 90, 16)
    plan = random_plan(2, 4, 200, 90, key_heads=2)
    share = torch.softmax(query @ key.repeat_interleave(2, dim=1).mT / 4.0, dim=-1)
    expected = (share * plan.to_mask()).sum(dim=-1)
    assert torch.allclose(recall(query, key, plan), expected.mean(dim=-1), atol=1e-5)
    rows = torch.tensor([0, 130, 199])
    in_plan_order = expected.gather(2, plan.query_order.long())
    assert torch.allclose(
        recall(query, key, plan, rows=rows), in_plan_order[:, :, rows].mean(dim=-1), atol=1e-5
    )
    assert torch.equal(density(plan), plan.density())


def test_recall_of_a_full_plan_is_one_whatever_the_padding() -> None:
    query, key = torch.randn(2, 1, 150, 8), torch.randn(2, 1, 150, 8)
    lengths = torch.tensor([100, 150])
    plan = SparsePlan.full(2, 1, 150, 150, query_lengths=lengths, key_lengths=lengths)
    assert torch.allclose(recall(query, key, plan), torch.ones(2, 1), atol=1e-5)


def test_needed_density_counts_the_fewest_keys() -> None:
    query = torch.zeros(1, 2, 3, 4)
    key = torch.zeros(1, 2, 50, 4)
    assert torch.allclose(
        needed_density(query, key, recall=0.9), torch.full((1, 2), 0.9), atol=0.021
    )
    query[:, 1] = key[:, 1, :5] = 10.0 * torch.eye(4)[0]
    found = needed_density(query, key, recall=0.9, rows=torch.tensor([0, 2]))
    assert found[0, 1].item() == pytest.approx(5 / 50)
    with pytest.raises(ValueError, match="recall must lie"):
        needed_density(query, key, recall=0.0)
