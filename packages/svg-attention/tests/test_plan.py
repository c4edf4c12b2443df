from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from svg_attention import KeySummary, SparsePlan
from svg_attention.rows import put_rows, take_rows
from svg_attention.tiles import count_tiles


def test_density_is_the_mean_of_the_mask(random_plan: Callable[..., SparsePlan]) -> None:
    plan = random_plan(2, 4, 300, 217, key_heads=2)
    assert torch.allclose(plan.density(), plan.to_mask().float().mean(dim=(-1, -2)), atol=1e-6)
    rounded = plan.rounded(8)
    assert (rounded.density() >= plan.density()).all()
    assert torch.equal(plan.to_mask() & rounded.to_mask(), plan.to_mask())


def test_to_mask_follows_both_orders() -> None:
    query_order = torch.tensor([[[2, 0, 1]]], dtype=torch.int32)
    key_order = torch.tensor([[[1, 3, 0, 2]]], dtype=torch.int32)
    plan = SparsePlan(
        query_length=3,
        key_length=4,
        tile_rows=2,
        query_order=query_order,
        key_order=key_order,
        run_starts=torch.tensor([[[[0], [2]]]], dtype=torch.int32),
        run_lengths=torch.tensor([[[[1], [2]]]], dtype=torch.int32),
    )
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[2, 1] = expected[0, 1] = True  # Positions 0 and 1 read position 0, token 1.
    expected[1, 0] = expected[1, 2] = True
    assert torch.equal(plan.to_mask()[0, 0], expected)


def test_density_counts_only_valid_queries_and_keys() -> None:
    plan = SparsePlan.full(
        2, 3, 200, 200, query_lengths=torch.tensor([150, 200]), key_lengths=torch.tensor([150, 200])
    )
    assert torch.equal(plan.density(), torch.ones(2, 3))
    assert plan.to_mask()[0, :, :, 150:].sum() == 0


@pytest.mark.parametrize("length", [1, 63, 129])
def test_put_rows_undoes_take_rows(length: int) -> None:
    x = torch.randn(2, 3, 80, length).transpose(-1, -2)
    order = torch.rand(2, 3, length).argsort(dim=-1).to(torch.int32)
    moved = take_rows(x, order)
    assert torch.equal(moved[1, 2, 0], x[1, 2, order[1, 2, 0]])
    assert torch.equal(put_rows(moved, order), x)


def test_count_tiles_covers_the_rows() -> None:
    assert [count_tiles(n) for n in (0, 1, 128, 129)] == [0, 1, 1, 2]


def test_sparse_plan_refuses_what_does_not_fit_itself() -> None:
    runs = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="300 queries are 3 tiles"):
        SparsePlan(query_length=300, key_length=9, run_starts=runs, run_lengths=runs)
    with pytest.raises(ValueError, match=r"\[B, H, T, R\]"):
        SparsePlan(query_length=200, key_length=9, run_starts=runs, run_lengths=runs[0])
    with pytest.raises(ValueError, match="key_order must be"):
        SparsePlan(
            query_length=200,
            key_length=9,
            run_starts=runs,
            run_lengths=runs,
            key_order=torch.zeros(1, 1, 8, dtype=torch.int32),
        )


def test_rounded_refuses_a_plan_with_centroids() -> None:
    runs = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    summary = KeySummary(
        keys=torch.zeros(1, 1, 2, 4),
        values=torch.zeros(1, 1, 2, 4),
        log_weights=torch.zeros(1, 1, 1, 2),
    )
    plan = SparsePlan(
        query_length=9, key_length=9, run_starts=runs, run_lengths=runs, summary=summary
    )
    with pytest.raises(ValueError, match="count twice"):
        plan.rounded(8)


def test_repr_is_readable_and_short(random_plan: Any) -> None:
    plan = random_plan(2, 4, 700, 900, key_heads=2)
    lines = repr(plan).splitlines()
    assert lines[0] == "SparsePlan on cpu"
    assert lines[1].strip() == "2 x 4 heads, 700 queries in 6 tiles of 128, 900 keys"
    assert f"density {float(plan.density().mean()):.1%}" in lines[2]
    assert lines[3].strip() == "queries and keys reordered"
    assert len(lines) == 4
    page = plan._repr_html_()
    assert page.count("<li>") == 3
    assert "700 queries" in page
    full = SparsePlan.full(1, 1, 130, 130)
    assert "every query reads every valid key" in repr(full)
    assert "tokens in the given order" in repr(full)


def test_ready_changes_nothing_on_a_cpu(random_plan: Any) -> None:
    plan = random_plan(1, 2, 300, 200)
    assert plan.ready() is plan


@pytest.mark.gpu
def test_ready_rounds_runs_and_orders_tiles_on_a_gpu(
    random_plan: Any, move_plan: Any, device: torch.device
) -> None:
    plan = move_plan(random_plan(2, 3, 700, 900), device)
    ready = plan.ready()
    assert ready.run_multiple == 8
    assert torch.equal(ready.to_mask(), plan.rounded(8).to_mask())
    tiles = torch.arange(2 * 3 * plan.tiles, device=device, dtype=torch.int32)
    assert torch.equal(ready.tile_order.flatten().sort().values, tiles)
    assert ready.ready() is ready
