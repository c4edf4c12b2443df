from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svg_attention import (
    SVG1,
    SVG2,
    LayerMemory,
    RandomBlocks,
    SparsePlan,
    TokenLayout,
    cluster_counts,
    recall,
    sparse_attention,
)
from svg_attention.planning import clustering

LAYOUT = TokenLayout(grid=(6, 16, 16))
SMALL: dict[str, Any] = {"q_clusters": 16, "k_clusters": 48, "first_iterations": 10}
Data = Callable[..., tuple[Tensor, Tensor, Tensor]]


def plan_of(
    method: Any,
    data: tuple[Tensor, Tensor, Tensor],
    layout: TokenLayout = LAYOUT,
    memory: LayerMemory | None = None,
    **options: Any,
) -> SparsePlan:
    return method.plan(
        *data,
        layout=layout,
        memory=memory or LayerMemory(),
        generator=torch.Generator().manual_seed(1),
        **options,
    )


def relative_error(plan: SparsePlan, data: tuple[Tensor, Tensor, Tensor]) -> float:
    exact = F.scaled_dot_product_attention(*data)
    out = sparse_attention(*data, plan)
    return float((out - exact).square().mean() / exact.square().mean())


def test_svg2_keeps_the_attention_that_other_methods_lose(clustered: Data) -> None:
    data = clustered(LAYOUT)
    kept = {}
    for method in (SVG2(density=0.25, **SMALL), SVG1(density=0.25), RandomBlocks(density=0.25)):
        plan = plan_of(method, data)
        assert plan.density().mean().item() == pytest.approx(0.25, abs=0.01)
        kept[type(method).__name__] = float(recall(*data[:2], plan).mean())
    assert kept["SVG2"] > 0.9
    assert kept["SVG1"] < 0.5
    assert kept["RandomBlocks"] < 0.5


def test_svg2_computes_what_its_mask_says(
    clustered: Data, masked_attention: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    data = clustered(LAYOUT)
    plan = plan_of(SVG2(density=0.3, **SMALL), data)
    exact, _ = masked_attention(*data, plan.to_mask())
    assert torch.allclose(sparse_attention(*data, plan).double(), exact, atol=1e-5)


def test_svg2_reaches_top_p_in_each_tile(clustered: Data) -> None:
    data = clustered(LAYOUT, noise=0.2)
    light = plan_of(SVG2(top_p=0.5, min_keep=0.0, **SMALL), data)
    heavy = plan_of(SVG2(top_p=0.95, min_keep=0.0, **SMALL), data)
    floor = plan_of(SVG2(top_p=0.5, min_keep=0.5, **SMALL), data)
    assert (light.density() < heavy.density()).all()
    assert (light.density() < floor.density()).all()
    assert float(recall(*data[:2], heavy).mean()) == pytest.approx(0.95, abs=0.06)
    assert 0.45 < float(recall(*data[:2], light).mean()) < 0.8


@pytest.mark.parametrize("text", [0, 40])
@pytest.mark.parametrize("density", [0.3, 0.5])
def test_svg2_density_is_at_or_just_below_the_request(
    clustered: Data, density: float, text: int
) -> None:
    layout = TokenLayout(grid=(6, 16, 16), text_tokens=text)
    for route in ("mass", "error"):
        method = SVG2(density=density, compensate=True, route=route, **SMALL)
        realised = plan_of(method, clustered(layout), layout).density()
        assert (realised <= density + 1e-6).all()
        assert (realised > density - 0.01).all()


def test_is_full_plans_are_dense_to_the_last_bit(clustered: Data) -> None:
    data = clustered(LAYOUT)
    exact = F.scaled_dot_product_attention(*data)
    for method in (
        SVG1(density=1.0),
        SVG2(density=1.0, **SMALL),
        SVG2(top_p=1.0, **SMALL),
        RandomBlocks(density=1.0),
    ):
        assert torch.equal(sparse_attention(*data, plan_of(method, data)), exact)


def test_svg2_keeping_every_cluster_equals_dense(clustered: Data) -> None:
    data = clustered(LAYOUT)
    plan = plan_of(SVG2(top_p=0.9, min_keep=1.0, **SMALL), data)
    assert not plan.is_full
    assert torch.equal(plan.density(), torch.ones(1, 2))
    exact = F.scaled_dot_product_attention(*data)
    assert torch.allclose(sparse_attention(*data, plan), exact, atol=1e-5)


def test_compensate_counts_every_key_once(clustered: Data) -> None:
    query, key, value = clustered(LAYOUT)
    # With keys all but equal every centroid is exact: weights are one over the number of keys.
    flat = 1.0 + 1e-4 * key
    value = torch.cat([value[..., :4], torch.ones_like(value[..., :1])], dim=-1)
    for route in ("mass", "error"):
        plan = plan_of(
            SVG2(density=0.3, compensate=True, route=route, **SMALL), (query, flat, value)
        )
        out, lse = sparse_attention(query, flat, value, plan, return_lse=True)
        expected = torch.logsumexp(query @ flat.mT / math.sqrt(32), dim=-1)
        assert torch.allclose(lse, expected, atol=1e-3)
        assert torch.allclose(out, value.mean(dim=2, keepdim=True).expand_as(out), atol=5e-3)
        assert plan.density().max() <= 0.3 + 1e-6


def test_compensate_gives_every_key_its_weight(clustered: Data) -> None:
    """Each output channel is the softmax weight of one key; compensated keys share their mean."""
    layout = TokenLayout(grid=(3, 8, 8))
    query, key, _ = clustered(layout, heads=1)
    value = torch.eye(layout.tokens)[None, None]
    method = SVG2(density=0.4, compensate=True, q_clusters=4, k_clusters=12)
    plan = plan_of(method, (query, key, value), layout)
    weights = sparse_attention(query, key, value, plan)
    assert torch.allclose(weights.sum(dim=-1), torch.ones(1, 1, layout.tokens), atol=1e-5)
    read = plan.to_mask()
    exact = query @ key.mT / math.sqrt(32)
    lse = sparse_attention(query, key, value, plan, return_lse=True)[1]
    assert torch.allclose(weights[read], torch.exp(exact - lse[..., None])[read], atol=1e-5)
    # What is left of each row is spread evenly inside each unread cluster.
    sizes = plan.summary.log_weights.exp().round().long()
    assert torch.equal((~read).sum(dim=-1)[0, 0, plan.query_order[0, 0, 0]], sizes[0, 0, 0].sum())
    assert (weights[~read] > 0).all()


def test_compensate_helps_and_route_by_error_helps_more(clustered: Data) -> None:
    data = clustered(LAYOUT, groups=60, noise=0.8, gain=2.0)
    plain = relative_error(plan_of(SVG2(density=0.15, **SMALL), data), data)
    mass = SVG2(density=0.15, compensate=True, **SMALL)
    compensated = relative_error(plan_of(mass, data), data)
    routed = relative_error(plan_of(replace(mass, route="error"), data), data)
    assert routed < compensated < 0.7 * plain


def test_route_by_error_inherits_the_budget_of_top_p(clustered: Data) -> None:
    data = clustered(LAYOUT)
    mass = SVG2(top_p=0.7, min_keep=0.0, compensate=True, **SMALL)
    by_mass = plan_of(mass, data).density()
    by_error = plan_of(replace(mass, route="error"), data).density()
    assert (by_error <= by_mass + 1e-6).all()
    assert (by_error > by_mass - 0.03).all()


def test_plan_of_a_batch_of_two_equals_two_of_one(clustered: Data) -> None:
    layout = TokenLayout(grid=(4, 12, 12), text_tokens=20)
    data = clustered(layout, batch=2)
    lengths = torch.tensor([7, 20])
    for method in (
        SVG2(density=0.4, compensate=True, route="error", **SMALL),
        SVG2(top_p=0.6, **SMALL),
        SVG1(density=0.6),
        RandomBlocks(density=0.6),
    ):
        both = plan_of(method, data, layout, text_lengths=lengths)
        out = sparse_attention(*data, both)
        for item in range(2):
            alone = tuple(x[item : item + 1] for x in data)
            plan = plan_of(method, alone, layout, text_lengths=lengths[item : item + 1])
            assert torch.equal(plan.run_starts, both.run_starts[item : item + 1])
            assert torch.equal(plan.run_lengths, both.run_lengths[item : item + 1])
            valid = layout.video_tokens + int(lengths[item])
            assert torch.allclose(
                sparse_attention(*alone, plan)[:, :, :valid],
                out[item : item + 1, :, :valid],
                atol=1e-6,
            )


def test_svg2_starts_from_the_clusters_of_the_step_before(clustered: Data) -> None:
    data = clustered(LAYOUT)
    memory = LayerMemory()
    method = SVG2(density=0.3, step_iterations=1, **(SMALL | {"first_iterations": 1}))
    first = plan_of(method, data, memory=memory)
    assert memory.query_centroids.shape == (1, 2, 16, 32)
    for _ in range(6):
        later = plan_of(method, data, memory=memory)
    assert float(recall(*data[:2], later).mean()) > float(recall(*data[:2], first).mean())
    fresh = plan_of(method, data, memory=LayerMemory())
    assert torch.equal(fresh.run_starts, first.run_starts)


def test_neighbour_order_makes_longer_runs_and_better_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Content that varies smoothly: tokens on a surface, close ones attend to each other.
    draw = torch.Generator().manual_seed(0)
    place = torch.rand(1, 2, LAYOUT.tokens, 2, generator=draw) * 2.0 * math.pi
    wave = torch.cat([place.sin(), place.cos()], dim=-1)
    query, key, value = (5.0 * wave, 5.0 * wave, torch.randn(wave.shape, generator=draw))
    data = (query, key, value)
    method = SVG2(q_clusters=40, k_clusters=80, density=0.1, first_iterations=10)
    ordered = plan_of(method, data)
    monkeypatch.setattr(
        clustering,
        "neighbour_order",
        lambda centroids: torch.arange(centroids.shape[2]).expand(centroids.shape[:3]),
    )
    shuffled = plan_of(method, data)
    runs = [
        float((plan.run_lengths > 0).sum(dim=-1).float().mean()) for plan in (ordered, shuffled)
    ]
    assert runs[0] < 0.7 * runs[1]
    kept = [float(recall(*data[:2], plan).mean()) for plan in (ordered, shuffled)]
    assert kept[0] > kept[1] + 0.05


def test_svg2_ignores_a_memory_of_another_resolution(clustered: Data) -> None:
    method = SVG2(density=0.3, **SMALL)
    memory = LayerMemory()
    plan_of(method, clustered(LAYOUT, heads=3), memory=memory)
    data = clustered(LAYOUT)
    plan = plan_of(method, data, memory=memory)
    assert torch.equal(plan.run_starts, plan_of(method, data).run_starts)


def test_svg2_clusters_grouped_key_heads_once(clustered: Data) -> None:
    query, key, value = clustered(LAYOUT, heads=4)
    data = (query, key[:, ::2].contiguous(), value[:, ::2].contiguous())
    plan = plan_of(SVG2(density=0.3, compensate=True, route="error", **SMALL), data)
    assert plan.key_order.shape[1] == plan.summary.keys.shape[1] == 2
    assert plan.query_order.shape[1] == 4
    exact = F.scaled_dot_product_attention(*data, enable_gqa=True)
    own = sparse_attention(*data, plan)[:, ::2] - exact[:, ::2]
    assert float(own.square().mean() / exact.square().mean()) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_svg2_plans_and_computes_in_half_precision(clustered: Data, dtype: torch.dtype) -> None:
    data = tuple(x.to(dtype) for x in clustered(LAYOUT))
    plan = plan_of(SVG2(density=0.3, compensate=True, route="error", **SMALL), data)
    out = sparse_attention(*data, plan)
    assert out.dtype == dtype
    assert plan.summary.keys.dtype == dtype
    assert relative_error(plan, data) < 0.05


def test_svg2_refuses_more_clusters_than_tokens_and_says_what_to_do() -> None:
    layout = TokenLayout(grid=(1, 4, 4))
    data = tuple(torch.randn(1, 1, 16, 8) for _ in range(3))
    with pytest.raises(ValueError, match="48 clusters cannot be made of 16 video tokens; ask for"):
        plan_of(SVG2(density=0.3, **SMALL), data, layout)
    plan = plan_of(SVG2(density=0.5, q_clusters=16, k_clusters=16), data, layout)
    assert plan.density().item() == pytest.approx(0.5)


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 3, 5), (2, 9, 9), (6, 16, 16)])
def test_svg2_without_cluster_counts_suits_any_number_of_tokens(
    grid: tuple[int, int, int],
) -> None:
    layout = TokenLayout(grid=grid, text_tokens=3)
    data = tuple(torch.randn(1, 2, layout.tokens, 8) for _ in range(3))
    memory = LayerMemory()
    plan = plan_of(SVG2(first_iterations=3), data, layout, memory)
    counts = cluster_counts(layout.video_tokens)
    assert memory.query_centroids.shape[2] == counts[0]
    assert memory.key_centroids.shape[2] == counts[1]
    assert sparse_attention(*data, plan).isfinite().all()
    assert SVG2.from_dict(SVG2().to_dict()) == SVG2()


def test_cluster_counts_shrink_with_the_sequence_and_keep_the_published_ones() -> None:
    assert cluster_counts(75_600) == (300, 1000)
    assert cluster_counts(1536) == (24, 96)
    assert cluster_counts(1536, 10, 20) == (10, 20)
    assert cluster_counts(5) == (1, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q_clusters": 0}, "q_clusters must be at least 1"),
        ({"step_iterations": 0}, "step_iterations must be at least 1"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"min_keep": 1.5}, "min_keep must lie"),
        ({"density": 1.5}, "density must lie"),
        ({"route": "taste"}, "'mass' or 'error'"),
        ({"route": "error"}, "set compensate=True"),
    ],
)
def test_svg2_refuses_bad_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SVG2(**fields)


def test_count_probes_keeps_what_is_read_within_the_density() -> None:
    layout = TokenLayout(grid=(4, 16, 16))
    tensors = torch.randn(3, 1, 2, layout.tokens, 16, generator=torch.Generator().manual_seed(0))
    residual = {"correct_residual": True, "share_branches": False, "share_steps": 1}
    for changes in ({}, residual, {"repair_rows": 0}):
        method = SVG2.corrected(0.35, **changes)
        plan = method.plan(*tensors, layout=layout)
        probes = method.probe_density(layout)
        assert probes > 0.03
        assert plan.probe_density == probes
        assert 0.33 < float(plan.density().mean()) + probes <= 0.3501
        more = replace(method, count_probes=False).plan(*tensors, layout=layout)
        assert float(more.density().mean()) > 0.33
    with pytest.raises(ValueError, match=r"read 9\.4% of the pairs, which leaves nothing"):
        SVG2.corrected(0.05).plan(*tensors, layout=layout)
