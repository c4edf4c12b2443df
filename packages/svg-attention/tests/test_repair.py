"""A regression from a few exact rows corrects the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_bias import CLUSTERS, LAYOUT, draw
from torch import Tensor

import svg_attention.attention
import svg_attention.corrections
from svg_attention import SVG2, LayerMemory, SparsePlan, TokenLayout, sparse_attention
from svg_attention.corrections import RIDGE, fit, reliance, repair
from svg_attention.plan import ExactRows

KINDS = ["clustered", "random", "offset", "skewed", "dominant", "equal", "large"]
MASS = {**CLUSTERS, "route": "mass"}
FULL = {**CLUSTERS, "correct_bias": True}


def plan_of(tensors: Any, layout: TokenLayout = LAYOUT, **options: Any) -> SparsePlan:
    lengths = options.pop("text_lengths", None)
    return SVG2(**options).plan(
        *tensors, layout=layout, memory=LayerMemory(), text_lengths=lengths,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip


def test_fit_scales_a_ridge_by_how_well_it_foretells_rows_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 1, 12, 3, generator=generator)
    slopes = torch.randn(3, 2, generator=generator)
    noise = torch.randn(1, 1, 12, 2, generator=generator)
    targets = rows @ slopes + 0.5 + 0.4 * noise
    targets = targets / targets.abs().amax()
    x = torch.cat([rows[0, 0].double(), torch.ones(12, 1).double()], dim=-1)
    y = targets[0, 0].double()
    ridge = RIDGE * x.square().sum() / 12

    def solve(kept: Tensor) -> Tensor:
        """Return the slopes of a plain ridge regression over some rows."""
        a, b = x[kept], y[kept]
        return torch.linalg.solve(a.T @ a + ridge * torch.eye(4).double(), a.T @ b)

    every = torch.arange(12)
    foreseen = torch.stack([x[i] @ solve(every[every != i]) for i in range(12)])
    trust = reliance((foreseen * y).sum(-1), foreseen.square().sum(-1))
    assert 0.3 < trust < 1
    got = fit(rows, targets, torch.ones(1, 1, 12, dtype=torch.bool))[0, 0].double()
    torch.testing.assert_close(x.T @ got, trust * solve(every), rtol=1e-5, atol=1e-6)


def test_reliance_is_the_least_squares_factor_less_two_standard_errors() -> None:
    predicted = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for truth, expected in ((0.5 * predicted, 0.5), (-predicted, 0.0), (3 * predicted, 1.0)):
        assert float(reliance(predicted * truth, predicted.square())) == pytest.approx(expected)
    # Best is 20 / 30; the products miss it by 1/3, -8/3, 3 and -2/3 squared predictions.
    truth = torch.tensor([1.0, 0.0, 3.0, 2.5])
    agreement, energy = predicted * truth, predicted.square()
    best = 20 / 30
    error = float((agreement - best * energy).square().sum().sqrt()) / 30
    assert float(reliance(agreement, energy)) == pytest.approx(max(best - 2 * error, 0))
    assert float(reliance(torch.zeros(4), torch.zeros(4))) == 0


def made(generator: torch.Generator, count: int = 300) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, sparse outputs, exact ones linear in both, and known tokens."""
    query, sparse = torch.randn(2, 1, 2, count, 8, generator=generator)
    a, b = 0.3 * torch.randn(2, 1, 2, 8, 8, generator=generator)
    exact = sparse + query @ a + sparse @ b + 0.2
    tokens = torch.randperm(count, generator=generator)[:64].sort().values.expand(1, 2, -1)
    return query, sparse, exact, tokens


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_repair_undoes_what_is_linear_in_output_and_query(size: float) -> None:
    query, sparse, exact, tokens = (
        x if x.dtype == torch.int64 else x * size for x in made(torch.Generator().manual_seed(0))
    )
    known = exact.gather(2, tokens[..., None].expand(-1, -1, -1, 8))
    rows = ExactRows(tokens=tokens, outputs=known, first=20, count=260)
    out = sparse.clone()
    repair(out, query, rows)
    video = slice(20, 280)
    before = (sparse[:, :, video] - exact[:, :, video]).norm()
    assert (out[:, :, video] - exact[:, :, video]).norm() < 0.05 * before
    assert torch.equal(out.gather(2, tokens[..., None].expand_as(known)), known)
    mine = torch.isin(torch.arange(300), tokens[0, 0])
    mine[video] = True
    assert torch.equal(out[:, :, ~mine], sparse[:, :, ~mine])


def test_repair_of_parts_equals_repair_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query, sparse, exact, tokens = made(torch.Generator().manual_seed(0))
    known = exact.gather(2, tokens[..., None].expand(-1, -1, -1, 8))
    rows = ExactRows(tokens=tokens, outputs=known, first=0, count=300)
    out, parts = sparse.clone(), sparse.transpose(1, 2).contiguous().transpose(1, 2)
    repair(out, query, rows)
    monkeypatch.setattr(svg_attention.corrections, "SCRATCH", 1)
    repair(parts, query, rows)
    torch.testing.assert_close(parts, out)


def rows_to_correct(
    width: int, depth: int, rows: int, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> list[Tensor]:
    """Return what `correct_rows` takes, outputs and queries with gaps between their rows."""
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(2, rows, 3, n + 8, generator=generator) for n in (width, depth)]
    out, query = (
        x.to(device, dtype).transpose(1, 2)[..., :n]
        for x, n in zip(wide, (width, depth), strict=True)
    )
    terms = [
        (size * torch.randn(2, 3, n, width, generator=generator)).to(device, dtype)
        for n, size in ((1, 3.0), (width, width**-0.5), (depth, depth**-0.5))
    ]
    return [out, query, *terms]


def corrected(out: Tensor, query: Tensor, *terms: Tensor) -> Tensor:
    """Return in fp64 what `correct_rows` makes of rows."""
    constant, by_output, by_query = (x.double() for x in terms)
    return out.double() + constant + out.double() @ by_output + query.double() @ by_query


@pytest.mark.parametrize(("width", "depth", "rows"), [(128, 128, 130), (80, 64, 7), (16, 40, 520)])
def test_correct_rows_in_triton_adds_what_fp64_does(width: int, depth: int, rows: int) -> None:
    from svg_attention.corrections import triton

    arguments = rows_to_correct(width, depth, rows, torch.float16)
    want = corrected(*arguments)
    beside = arguments[0]._base
    assert beside is not None
    gaps = beside[..., width:].clone()
    triton.correct_rows(*arguments)
    torch.testing.assert_close(arguments[0].double(), want, rtol=1e-3, atol=2e-3)
    assert torch.equal(beside[..., width:], gaps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "depth", "rows"), [(128, 128, 5000), (80, 64, 7), (16, 40, 520)])
def test_correct_rows_on_a_gpu_adds_what_fp64_does(
    device: torch.device, width: int, depth: int, rows: int, dtype: torch.dtype
) -> None:
    arguments = rows_to_correct(width, depth, rows, dtype, device)
    want = corrected(*arguments)
    assert svg_attention.corrections._kernel_serves(*arguments[:2])
    svg_attention.corrections.correct_rows(*arguments)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(arguments[0].double(), want, rtol=unit, atol=4 * unit)


@pytest.mark.gpu
def test_correct_rows_addresses_more_than_two_to_the_31_values(device: torch.device) -> None:
    rows = 2**31 // (3 * 128) + 1000
    out = torch.full((1, 3, rows, 128), 1.0, dtype=torch.bfloat16, device=device)
    terms = [torch.zeros(1, 3, n, 128, dtype=out.dtype, device=device) for n in (1, 128, 128)]
    terms[0] += torch.tensor([1.0, 2.0, 3.0], device=device)[None, :, None, None]
    svg_attention.corrections.correct_rows(out, out, *terms)
    for head in range(3):
        assert (out[0, head, -2000:] == 2.0 + head).all()
        assert (out[0, head, :2000] == 2.0 + head).all()


def test_repair_leaves_heads_alone_whose_rows_do_not_foretell_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    query, sparse, _, tokens = made(generator)
    exact = sparse + torch.randn(sparse.shape, generator=generator)
    known = exact.gather(2, tokens[..., None].expand(-1, -1, -1, 8))
    out = sparse.clone()
    repair(out, query, ExactRows(tokens=tokens, outputs=known, first=0, count=300))
    others = ~torch.isin(torch.arange(300), tokens[0, 0])
    assert (out - sparse)[:, :, others].abs().max() < 0.05


def test_repair_passes_over_rows_that_are_not_finite() -> None:
    query, sparse, exact, tokens = made(torch.Generator().manual_seed(0))
    known = exact.gather(2, tokens[..., None].expand(-1, -1, -1, 8)).clone()
    known[0, 0, 3], known[0, 0, 9, 2] = torch.nan, torch.inf
    query[0, 0, tokens[0, 0, 5]] = torch.nan
    known[0, 1] = torch.nan
    out = sparse.clone()
    repair(out, query, ExactRows(tokens=tokens, outputs=known, first=0, count=300))
    bad = tokens[0, 0, 5]
    assert out[0, 0, torch.arange(300) != bad].isfinite().all()
    assert (out[0, 0] - exact[0, 0])[torch.arange(300) != bad].norm() < 0.1 * exact[0, 0].norm()
    assert torch.equal(out[0, 1], sparse[0, 1])


@pytest.mark.parametrize("rows", [16, 64, 256])
@pytest.mark.parametrize("settings", [MASS, FULL, {**FULL, "correct_residual": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_repaired_call_is_never_worse_by_more_than_noise(
    kind: str, settings: dict[str, Any], rows: int
) -> None:
    tensors = draw(kind)
    plan = plan_of(tensors, **settings, repair_rows=rows)
    exact = F.scaled_dot_product_attention(*(x.double() for x in tensors))
    plain, repaired = (
        float((sparse_attention(*tensors, p) - exact).square().mean() / exact.var())
        for p in (replace(plan, exact_rows=None), plan)
    )
    assert repaired <= 1.02 * plain + 1e-6
    if kind == "clustered" and rows >= 64:
        assert repaired < 0.93 * plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_repair_is_finite_for_scores_of_80_and_empty_clusters(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (1, 2, LAYOUT.tokens, 1), generator=generator) * 2.0 - 1
    base = torch.randn(1, 2, 1, 16, generator=generator)
    base = base / base.norm(dim=-1, keepdim=True) * 320**0.5
    query, key = signs * base, signs.roll(7, 2) * base
    assert (query @ key.transpose(-1, -2) * 0.25).abs().amax() == pytest.approx(80, rel=1e-3)
    value = torch.randn(1, 2, LAYOUT.tokens, 16, generator=generator)
    tensors = tuple(x.to(dtype) for x in (query, key, value))
    # Two directions fill two of the 40 clusters.
    plan = plan_of(tensors, **FULL, correct_residual=True, repair_rows=64)
    out = sparse_attention(*tensors, plan)
    exact = F.scaled_dot_product_attention(*(x.double() for x in tensors))
    assert (out - exact).abs().max() < (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("text_position", ["first", "last"])
@pytest.mark.parametrize("valid", [None, [24, 7]])
@pytest.mark.parametrize("residual", [False, True])
def test_exact_rows_are_attention_over_every_valid_key_and_text_stays(
    text_position: Any, valid: list[int] | None, residual: bool
) -> None:
    layout = TokenLayout(grid=(4, 12, 14), text_tokens=24, text_position=text_position)
    lengths = None if valid is None else torch.tensor(valid)
    drawn = (x[:, :, : layout.tokens] for x in draw("clustered"))
    query, key, value = (x.expand(2, -1, -1, -1).clone() for x in drawn)
    query[1] *= 1.3
    plan = plan_of(
        (query, key, value), layout, **FULL, correct_residual=residual, repair_rows=20,
        text_lengths=lengths,
    )  # fmt: skip
    rows = plan.exact_rows
    assert rows is not None
    assert rows.tokens.shape == (2, 2, 20)
    video = (rows.tokens >= layout.video_start) & (rows.tokens < layout.video_start + 672)
    assert video.all()
    place = torch.arange(layout.tokens) - layout.text_start
    mask = torch.ones(2, 1, 1, layout.tokens, dtype=torch.bool)
    if lengths is not None:
        mask = ((place < 0) | (place >= 24) | (place < lengths[:, None]))[:, None, None]
    exact = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    index = rows.tokens[..., None].expand(-1, -1, -1, 16)
    torch.testing.assert_close(rows.outputs, exact.gather(2, index), rtol=1e-4, atol=1e-5)
    out, plain = (
        sparse_attention(query, key, value, p) for p in (plan, replace(plan, exact_rows=None))
    )
    torch.testing.assert_close(out.gather(2, index), rows.outputs)
    text = slice(layout.text_start, layout.text_start + 24)
    assert torch.equal(out[:, :, text], plain[:, :, text])
    # Rows of the tile that holds text, too, are exact already.
    assert rows.whole is not None
    kept = rows.whole[..., None].expand(-1, -1, -1, 16)
    torch.testing.assert_close(out.gather(2, kept), exact.gather(2, kept), rtol=1e-4, atol=2e-5)
    assert not torch.equal(out, plain)


def test_probes_in_parts_equal_probes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = draw("clustered")
    query = torch.cat([query, 1.2 * query], dim=1)
    plan = plan_of((query, key, value), **FULL, correct_residual=True)
    whole, lse = sparse_attention(query, key, value, plan, return_lse=True)
    monkeypatch.setattr(svg_attention.attention, "PROBED_BYTES", 1)
    parts, parts_lse = sparse_attention(query, key, value, plan, return_lse=True)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(parts_lse, lse)


def test_a_repaired_plan_waits_for_no_device(no_sync: Callable[[], Any]) -> None:
    query, sparse, exact, tokens = made(torch.Generator().manual_seed(0))
    known = exact.gather(2, tokens[..., None].expand(-1, -1, -1, 8))
    with no_sync():
        repair(sparse, query, ExactRows(tokens=tokens, outputs=known, first=0, count=300))


def test_density_counts_exact_rows_and_the_plan_says_so() -> None:
    plan = plan_of(draw("random"), **MASS, repair_rows=64)
    assert plan.probe_density == 64 / LAYOUT.tokens
    assert "64 exact rows a head correct the others" in repr(plan)
    half = 0.5 * 48 * LAYOUT.video_tokens / LAYOUT.tokens**2
    assert SVG2(**FULL, repair_rows=64).probe_density(LAYOUT) == 64 / LAYOUT.tokens + half
    short = TokenLayout(grid=(1, 4, 4))
    assert SVG2(repair_rows=64).probe_density(short) == 1


def test_repair_rows_names_wrong_settings() -> None:
    with pytest.raises(ValueError, match="at most 256"):
        SVG2(repair_rows=257)
    with pytest.raises(TypeError, match="must be an integer"):
        SVG2(repair_rows=True)
    assert SVG2.from_dict(SVG2(repair_rows=64).to_dict()) == SVG2(repair_rows=64)
