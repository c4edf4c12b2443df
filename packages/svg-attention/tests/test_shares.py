"""The keys of a call shared where they save most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_bias import CLUSTERS, LAYOUT, draw
from torch import Tensor

from svg_attention import SVG2, LayerMemory, sparse_attention
from svg_attention.planning import shares
from svg_attention.planning.shares import share_budget


def greedy(gain: Tensor, sizes: Tensor, keys: float) -> Tensor:
    """Return the keys of each tile `[H, T]` when clusters are taken one by one, best first."""
    taken = torch.zeros(gain.shape[:2])
    heads, _, clusters = gain.shape
    for place in gain.flatten().argsort(descending=True).tolist():
        if taken.sum() >= keys:
            break
        h, t = place // clusters // gain.shape[1], place // clusters % gain.shape[1]
        taken[h, t] += sizes[h % heads, place % clusters]
    return taken


def test_share_budget_takes_the_largest_gains_of_all_tiles() -> None:
    generator = torch.Generator().manual_seed(0)
    gain = torch.rand(2, 3, 4, 10, generator=generator)
    gain[0, 1] *= 0.1
    sizes = torch.randint(1, 20, (2, 3, 10), generator=generator, dtype=torch.int32)
    room = share_budget(gain, sizes, torch.tensor([30.0]), 4 * 128)
    for item in range(2):
        want = greedy(gain[item], sizes[item], 30 * 12)
        # The last cluster may overshoot, and all shares are scaled back alike.
        assert 30 * 12 <= want.sum() < 30 * 12 + 20
        torch.testing.assert_close(room[item], 15 + 0.5 * want * (30 * 12 / want.sum()))
    assert room[0, 1].mean() < 0.45 * room[0, [0, 2]].mean()


def test_share_budget_counts_the_rows_of_the_last_tile() -> None:
    gain = torch.rand(1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    sizes = torch.full((1, 2, 8), 10, dtype=torch.int32)
    length = 2 * 128 + 5
    room = share_budget(gain, sizes, torch.tensor([24.0]), length)
    rows = torch.tensor([128.0, 128.0, 5.0])
    assert float((room * rows).sum()) == pytest.approx(24 * 2 * length)


def test_share_budget_of_equal_gains_is_equal_and_never_more_than_all() -> None:
    sizes = torch.full((1, 2, 8), 10, dtype=torch.int32)
    for gain in (torch.zeros(1, 2, 3, 8), torch.full((1, 2, 3, 8), torch.nan)):
        room = share_budget(gain, sizes, torch.tensor([24.0]), 3 * 128)
        torch.testing.assert_close(room, torch.full((1, 2, 3), 24.0))
    assert (share_budget(torch.rand(1, 2, 3, 8), sizes, torch.tensor([500.0]), 384) <= 80).all()


def test_share_budget_of_a_sample_of_tiles_comes_close(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    gain = torch.rand(1, 4, 64, 30, generator=generator).square()
    gain[:, 2] *= 0.2
    sizes = torch.randint(1, 20, (1, 4, 30), generator=generator, dtype=torch.int32)
    want = share_budget(gain, sizes, torch.tensor([90.0]), 64 * 128)
    monkeypatch.setattr(shares, "SORTED", 4 * 16 * 30)
    got = share_budget(gain, sizes, torch.tensor([90.0]), 64 * 128)
    assert not torch.equal(got, want)
    assert float(got.sum()) == pytest.approx(90 * 4 * 64, rel=1e-5)
    torch.testing.assert_close(got.mean(-1), want.mean(-1), rtol=0.05, atol=0)


def error_of(tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> tuple[float, float]:
    """Return the mean square error of a call, relative to its variance, and its density."""
    plan = SVG2(**options).plan(
        *tensors, layout=LAYOUT, memory=LayerMemory(),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    exact = F.scaled_dot_product_attention(*tensors)
    out = sparse_attention(*tensors, plan)
    return float((out - exact).square().mean() / exact.var()), float(plan.density().mean())


@pytest.mark.parametrize("kind", ["clustered", "random", "offset", "dominant", "equal", "large"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_shared_budget_lowers_the_error_where_heads_differ(kind: str, bias: bool) -> None:
    query, key, value = draw(kind)
    query = torch.cat([query, 0.1 * query], dim=1)
    tensors = (query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1))
    options = {**CLUSTERS, "correct_bias": bias}
    (plain, _), (shared, density) = (
        error_of(tensors, **options, spend=how) for how in ("tile", "call")
    )
    assert shared <= 1.02 * plain + 1e-6
    assert density <= 0.2 or kind == "equal"
    if kind in ("clustered", "random"):
        assert shared < 0.9 * plain


def test_share_budget_waits_for_no_device(no_sync: Callable[[], Any]) -> None:
    with no_sync():
        share_budget(
            torch.rand(2, 3, 4, 10), torch.ones(2, 3, 10, dtype=torch.int32), torch.ones(2), 500
        )


def test_spend_names_wrong_settings() -> None:
    for changes in ({"density": None}, {"route": "mass"}):
        with pytest.raises(ValueError, match="set density and route='error'"):
            SVG2(**{**CLUSTERS, **changes}, spend="call")
    with pytest.raises(ValueError, match="spend must be 'tile' or 'call'"):
        SVG2(spend="head")  # type: ignore[arg-type]
