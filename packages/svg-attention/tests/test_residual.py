"""Probes whose exact outputs correct their rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_bias import CLUSTERS, LAYOUT, draw

from svg_attention import SVG2, LayerMemory, SparsePlan, TokenLayout, sparse_attention
from svg_attention.corrections import foretold
from svg_attention.methods.probes import probe_places
from svg_attention.rows import take_rows

BIASED = {**CLUSTERS, "correct_bias": True}


@pytest.mark.parametrize(
    ("count", "rows"), [(30, 4), (31, 4), (32, 4), (1, 16), (15, 16), (16, 16)]
)
def test_probe_places_puts_a_probe_behind_its_rows(count: int, rows: int) -> None:
    row, probe = probe_places(count, rows, torch.device("cpu"))
    mine: list[int] = []
    seen: list[int] = []
    probes = 0
    for r, p in zip(row.tolist(), probe.tolist(), strict=True):
        if p < 0:
            mine.append(r)
            continue
        assert p == probes
        assert r in mine
        assert len(mine) == rows - 1 or len(seen) + len(mine) == count
        seen, mine, probes = seen + mine, [], probes + 1
    assert seen == list(range(count))
    assert len(row) == count + probes


@pytest.mark.parametrize("text_position", ["first", "last"])
@pytest.mark.parametrize("valid", [None, [24, 7]])
def test_the_plan_corrects_rows_by_their_probe(valid: list[int] | None, text_position: str) -> None:
    layout = TokenLayout(grid=(4, 12, 16), text_tokens=24, text_position=text_position)
    query, key, value = (x.expand(2, -1, -1, -1).clone() for x in draw("clustered"))
    query[1] *= 1.3
    lengths = None if valid is None else torch.tensor(valid)
    plan = SVG2(**BIASED, correct_residual=True).plan(
        query, key, value, layout=layout, memory=LayerMemory(), text_lengths=lengths,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    residual, order = plan.residual, plan.query_order
    assert residual is not None
    assert order is not None
    tokens = layout.tokens
    assert torch.equal(order.sort(-1).values[0, 0], torch.arange(order.shape[-1]).int())
    got = sparse_attention(query, key, value, plan)
    # The same plan without a residual, over queries and probes in one tensor.
    joined = replace(plan, residual=None, query_length=plan.positions)
    queries = torch.cat([query, residual.queries], dim=2)
    plain = sparse_attention(queries, key, value, joined)
    places = torch.arange(tokens) - layout.text_start
    mask = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    if valid is not None:
        mask = (places < lengths[:, None]) | (places >= 24) | (places < 0)
        mask = mask[:, None, None]
    exact = F.scaled_dot_product_attention(residual.queries, key, value, attn_mask=mask)
    torch.testing.assert_close(residual.outputs, exact, rtol=1e-4, atol=1e-5)
    lacking = foretold(residual.outputs - plain[:, :, tokens:])
    rows = take_rows(queries, order)
    group = -1
    for place in range(residual.positions):
        group += place % 16 == 0
        token = order[:, :, place].long()
        for b in range(2):
            for h in range(2):
                t = int(token[b, h])
                if t < tokens:
                    want = plain[b, h, t] + lacking[b, h, group]
                    torch.testing.assert_close(got[b, h, t], want, rtol=1e-5, atol=1e-5)
                else:
                    assert t == tokens + group
                    assert torch.equal(rows[b, h, place], residual.queries[b, h, group])
    text = slice(layout.text_start, layout.text_start + 7)
    torch.testing.assert_close(got[:, :, text], plain[:, :, text])


@pytest.mark.parametrize("probe_rows", [8, 16, 32])
@pytest.mark.parametrize(
    "kind", ["clustered", "random", "offset", "skewed", "dominant", "equal", "large"]
)
def test_a_residual_is_never_worse_than_the_same_plan_without_by_more_than_noise(
    kind: str, probe_rows: int
) -> None:
    tensors = draw(kind)
    plan = SVG2(**BIASED, probe_rows=probe_rows, correct_residual=True).plan(
        *tensors, layout=LAYOUT, memory=LayerMemory(),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    exact = F.scaled_dot_product_attention(*tensors)
    plain, corrected = (
        float((sparse_attention(*tensors, made) - exact).square().mean() / exact.var())
        for made in (uncorrected(plan), plan)
    )
    assert corrected <= 1.02 * plain + 1e-6
    if kind == "random" and probe_rows < 32:
        assert corrected < 0.95 * plain


def uncorrected(plan: SparsePlan) -> SparsePlan:
    """Return the plan with probes that are not finite, which correct nothing."""
    residual = plan.residual
    assert residual is not None
    return replace(plan, residual=replace(residual, outputs=residual.outputs * torch.nan))


def test_rows_that_equal_their_probe_become_exact() -> None:
    query, key, value = draw("clustered")
    layout = TokenLayout(grid=LAYOUT.grid)
    query, key, value = (x[:, :, : layout.tokens] for x in (query, key, value))
    query = query[:, :, :1].expand_as(query).contiguous()
    plan = SVG2(**CLUSTERS, correct_residual=True).plan(
        query, key, value, layout=layout, memory=LayerMemory(),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    got = sparse_attention(query, key, value, plan)
    exact = F.scaled_dot_product_attention(query, key, value)
    plain = sparse_attention(
        torch.cat([query, plan.residual.queries], dim=2), key, value,
        replace(plan, residual=None, query_length=plan.positions),
    )  # fmt: skip
    assert (plain[:, :, : layout.tokens] - exact).abs().max() > 1e-2
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


def test_density_counts_what_probes_read_and_stays_below_the_request() -> None:
    for text in (0, 24):
        layout = TokenLayout(grid=LAYOUT.grid, text_tokens=text)
        tensors = tuple(x[:, :, : layout.tokens] for x in draw("clustered"))
        plan = SVG2(**BIASED, correct_residual=True).plan(
            *tensors, layout=layout, memory=LayerMemory(),
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        pairs = plan.run_lengths.sum(-1) * plan.tile_rows_valid()
        torch.testing.assert_close(plan.density(), pairs.sum(-1) / layout.tokens**2)
        # Of 768 video rows, 52 probes read every video key, its value too.
        assert plan.probe_density == pytest.approx(52 * 768 / layout.tokens**2)
        assert 0.17 < float(plan.density().min()) <= float(plan.density().max()) <= 0.2


def test_foretold_is_the_least_squares_factor_of_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    lacking = torch.randn(1, 3, 8, 5, generator=generator)
    lacking[:, 0, 1::2] = 0.5 * lacking[:, 0, ::2]
    lacking[:, 1, 1::2] = -lacking[:, 1, ::2]
    lacking[:, 2, 1::2] = lacking[:, 2, ::2]
    found = foretold(lacking)
    # Each neighbour predicts the other: 2 * 0.5 / (1 + 0.25).
    torch.testing.assert_close(found[:, 0], 0.8 * lacking[:, 0])
    assert (found[:, 1] == 0).all()
    torch.testing.assert_close(found[:, 2], lacking[:, 2])
    assert (foretold(torch.zeros(1, 1, 4, 2)) == 0).all()
    assert (foretold(torch.ones(1, 1, 1, 2)) == 0).all()
    lacking[0, 2, 3, 1] = torch.nan
    assert foretold(lacking).isfinite().all()


def test_correct_residual_names_wrong_settings() -> None:
    with pytest.raises(ValueError, match="set route='error'"):
        SVG2(compensate=True, correct_residual=True)
    with pytest.raises(ValueError, match="at least 2 rows"):
        SVG2(compensate=True, route="error", correct_residual=True, probe_rows=1)


def test_a_plan_with_a_residual_says_so() -> None:
    plan = SVG2(**BIASED, correct_residual=True).plan(
        *draw("clustered"), layout=LAYOUT, memory=LayerMemory(),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert isinstance(plan, SparsePlan)
    assert "52 probes correct their rows" in repr(plan)
    assert plan.to_mask().shape[2:] == (LAYOUT.tokens, LAYOUT.tokens)
