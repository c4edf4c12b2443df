"""NaN and infinity: never worse than dense attention, and never beyond their own head or call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from svg_attention import (
    SVG1,
    SVG2,
    LayerMemory,
    RandomBlocks,
    Schedule,
    Session,
    TokenLayout,
    sparse_attention,
)
from svg_attention.planning.clustering import Clusters, cluster_rows, neighbour_order
from svg_attention.planning.dispatch import select_planner
from svg_attention.planning.pattern_error import pattern_error
from svg_attention.planning.probe_sums import probe_sums
from svg_attention.planning.probes import probe_mass, probe_means
from svg_attention.planning.selection import keep_budget, keep_top_p

LAYOUT = TokenLayout(grid=(3, 10, 13), text_tokens=12)
FEW = {"q_clusters": 6, "k_clusters": 14, "first_iterations": 4}
METHODS = [
    SVG1(density=0.5),
    RandomBlocks(density=0.4),
    SVG2(top_p=0.6, min_keep=0.0, **FEW),
    SVG2(density=0.3, **FEW),
    SVG2(density=0.3, compensate=True, route="error", **FEW),
    SVG2(top_p=0.5, compensate=True, **FEW),
]
BAD = [float("nan"), float("inf"), float("-inf")]


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax attention computed as the formula says."""
    logits = query.double() @ key.double().mT * query.shape[-1] ** -0.5
    return torch.softmax(logits, dim=-1) @ value.double()


def draw(device: torch.device | str = "cpu", seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2, 3, LAYOUT.tokens, 64)
    return [x.to(device) for x in torch.randn(shape, generator=generator) * 1.5]


def run(method: Any, data: list[Tensor], memory: LayerMemory) -> Tensor:
    generator = torch.Generator(device=data[0].device).manual_seed(5)
    plan = method.plan(*data, layout=LAYOUT, memory=memory, generator=generator)
    for order in (plan.query_order, plan.key_order):
        if order is not None:
            places = torch.arange(LAYOUT.tokens, device=order.device, dtype=order.dtype)
            assert torch.equal(order.sort(dim=-1).values, places.expand_as(order))
    return sparse_attention(*data, plan)


def hold_to_dense(method: Any, bad: float, which: int, device: torch.device | str) -> None:
    """Check a call with one value that is not finite, and the call after it."""
    clean = draw(device)
    memory, spoiled = LayerMemory(), LayerMemory()
    expected = run(method, clean, memory)
    data = [x.clone() for x in clean]
    data[which][1, 2, 77, 5] = bad
    out = run(method, data, spoiled)
    exact = dense(*data)
    assert not (~out.isfinite() & exact.isfinite()).any(), "not finite where dense attention is"
    touched = torch.zeros(2, 3, dtype=torch.bool)
    touched[1, 2] = True
    assert torch.equal(out[~touched], expected[~touched]), "another head or item changed"
    if not exact[1, 2].isnan().all():
        rows = exact[1, 2].isfinite().all(dim=-1)
        broken = isinstance(method, SVG2)
        if broken:  # What cannot be planned is computed.
            assert torch.allclose(out[1, 2][rows].double(), exact[1, 2][rows], atol=1e-3)
    later = draw(device, seed=1)
    again, fresh = run(method, later, spoiled), run(method, later, memory)
    assert again.isfinite().all(), "a later call is spoiled"
    assert torch.equal(again[~touched], fresh[~touched])


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_sparse_attention_is_not_finite_only_where_dense_is(
    method: Any, bad: float, which: int
) -> None:
    hold_to_dense(method, bad, which, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_sparse_attention_on_a_gpu_survives_what_is_not_finite(
    method: Any, bad: float, which: int, device: torch.device
) -> None:
    hold_to_dense(method, bad, which, device)
    torch.cuda.synchronize()  # The context lives.


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("which", [0, 1], ids=["query", "key"])
def test_sparse_attention_takes_huge_values(method: Any, which: int) -> None:
    for huge in (1e18, 1e34, 3e38):
        data = draw()
        data[which][0, 1, 200] = huge
        out = run(method, data, LayerMemory())
        exact = torch.nn.functional.scaled_dot_product_attention(*data)
        assert out[1].isfinite().all()
        if huge < 1e38:  # Beyond, products overflow, and where depends on the order of their sums.
            assert exact.isfinite().all()
            assert out.isfinite().all()


def test_attend_says_once_which_call_was_not_finite() -> None:
    session = Session(
        METHODS[3],
        Schedule(dense_steps=0.25, dense_layers=0.0),
        layout=LAYOUT,
        num_steps=4,
        num_layers=2,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(4):
            with session.step(i):
                for layer in range(2):
                    data = draw(seed=i)
                    if i >= 2 and layer == 1:
                        data[1][0, 0, 3] = torch.nan
                    session.attend(*data, layer=layer)
    said = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(said) == 1
    assert "layer 1 at step 2" in said[0]
    assert [r.finite for r in session.records()] == [True] * 5 + [False, True, False]
    session.reset()
    data = draw()
    data[0][1, 1, 9] = torch.inf
    with session.step(1):
        with pytest.warns(RuntimeWarning, match="layer 0 at step 1"):
            session.attend(*data, layer=0)


@pytest.mark.gpu
def test_attend_says_so_on_a_gpu_without_waiting(device: torch.device) -> None:
    schedule = Schedule(dense_steps=0.0, dense_layers=0.0)
    session = Session(METHODS[3], schedule, layout=LAYOUT, num_steps=4, num_layers=1)
    data = [draw(device, seed=i) for i in range(4)]
    data[1][0][1, 2, 4] = torch.nan
    with session.step(0):
        session.attend(*data[0], layer=0)  # compiles
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i in range(1, 3):
                with session.step(i):
                    session.attend(*data[i], layer=0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert [r.finite for r in session.records()] == [True, False, True]
    session.reset()
    with session.step(0):
        session.attend(*data[1], layer=0)
    with pytest.warns(RuntimeWarning, match="layer 0 at step 0"):
        session.records()


@pytest.mark.parametrize("bad", [*BAD, 1e18, 3e38])
def test_neighbour_order_is_a_permutation_whatever_the_centroids_hold(bad: float) -> None:
    centroids = torch.randn(1, 4, 12, 64, generator=torch.Generator().manual_seed(0))
    clean = neighbour_order(centroids)
    centroids[0, 0, 3] = bad
    order = neighbour_order(centroids)
    assert torch.equal(order.sort(dim=-1).values, torch.arange(12).expand(1, 4, 12))
    assert torch.equal(order[:, 1:], clean[:, 1:])


def clusters_of(x: Tensor, remembered: Tensor | None = None) -> Clusters:
    generator = torch.Generator(device=x.device).manual_seed(1)
    return cluster_rows(x, 9, remembered=remembered, iterations=(6, 2), generator=generator)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_cluster_rows_marks_the_head_and_leaves_the_others_alone(bad: float, place: str) -> None:
    x = torch.randn(2, 3, 150, 16, generator=torch.Generator().manual_seed(0)).to(place)
    clean = clusters_of(x)
    x[1, 0, 7, 3] = bad
    found = clusters_of(x)
    expected = torch.zeros(2, 3, dtype=torch.bool, device=place)
    assert torch.equal(clean.broken, expected)
    expected[1, 0] = True
    assert torch.equal(found.broken, expected)
    assert found.centroids.isfinite().all()
    assert found.labels.min() >= 0
    assert found.labels.max() < 9
    rows = torch.arange(150, device=place, dtype=torch.int32).expand(2, 3, 150)
    assert torch.equal(found.order.sort(dim=-1).values, rows)
    assert torch.equal(found.sizes.sum(dim=-1), torch.full_like(found.sizes[..., 0], 150))
    for name in ("labels", "centroids", "order"):
        mine, theirs = getattr(found, name), getattr(clean, name)
        assert torch.equal(mine[~expected], theirs[~expected])
    healed = clusters_of(x.nan_to_num(0, 0, 0), remembered=found.centroids)
    assert not healed.broken.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_selection_keeps_every_cluster_of_a_tile_it_cannot_judge(
    planner: str, device: torch.device, generator: torch.Generator, bad: float
) -> None:
    shape = (1, 2, 3, 20)
    mass = torch.rand(shape, generator=generator, device=device)
    sizes = torch.randint(0, 9, (1, 2, 20), generator=generator, device=device).int()
    sizes[..., 0] = 5
    budget = torch.full((1, 2, 3), 9.0, device=device)

    def select(mass: Tensor) -> list[Tensor]:
        return [
            keep_top_p(mass, mass, sizes, top_p=0.4, backend=planner),
            keep_budget(mass, sizes, budget, backend=planner),
        ]

    clean = select(mass)
    mass[0, 1, 2, 4] = bad
    for before, after in zip(clean, select(mass), strict=True):
        assert torch.equal(after[0, 1, 2], sizes[0, 1] > 0)
        assert torch.equal(after[0, 0], before[0, 0])
        assert torch.equal(after[0, 1, :2], before[0, 1, :2])


@pytest.mark.parametrize("bad", BAD)
def test_probes_and_errors_keep_what_is_not_finite_to_its_head(
    planner: str, device: torch.device, generator: torch.Generator, bad: float
) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    query, key, value = normal(1, 2, 150, 16), normal(1, 2, 90, 16), normal(1, 2, 90, 8)
    sizes = torch.full((1, 2, 9), 10, dtype=torch.int32, device=device)
    order = torch.arange(90, dtype=torch.int32, device=device).expand(1, 2, 90).contiguous()
    places = torch.arange(150, dtype=torch.int32, device=device).expand(1, 2, 150).contiguous()
    reads = torch.full((1, 5, 90), 7, dtype=torch.uint8, device=device)
    reads[:, :, 40:] = 3

    def estimate() -> list[Tensor]:
        means = probe_means(query, places, backend=planner)
        centroids, value_means = (
            key.unflatten(2, (9, 10)).mean(3),
            value.unflatten(2, (9, 10)).mean(3),
        )
        probed = {"length": 150, "scale": 0.3, "backend": planner}
        mass = probe_mass(means, centroids, sizes, **probed)
        found = probe_sums(means, key, value, order, centroids, value_means, sizes, **probed)
        lost = pattern_error(query[:, :, :5], key, value, reads, scale=0.3, backend=planner)
        return [means, mass, found.error, found.bias, lost.permute(1, 2, 0)]

    clean = estimate()
    for tensor in (query, key, value):
        kept = tensor.clone()
        tensor[0, 1, 3, 2] = bad
        for before, after in zip(clean, estimate(), strict=True):
            assert torch.equal(after[:, 0], before[:, 0])
        tensor.copy_(kept)


def test_select_planner_returns_modules_with_the_same_functions(interpreted: None) -> None:
    plain, kernels = (select_planner(name, torch.device("cpu")) for name in ("reference", "triton"))
    for name in kernels.__all__:
        assert hasattr(plain, name)


def test_hold_to_dense_notices_a_spoiled_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import svg_attention.planning.clusters as module

    original: Callable[..., Any] = module.plan_clusters
    import svg_attention.methods.svg2 as svg2

    def forget(*args: Any, **kwargs: Any) -> Any:
        for clusters in (args[3], args[4]):
            clusters.broken.zero_()
        reads = original(*args, **kwargs)
        object.__setattr__(reads, "run_lengths", reads.run_lengths * 0)
        return reads

    monkeypatch.setattr(svg2, "plan_clusters", forget)
    with pytest.raises(AssertionError):
        hold_to_dense(METHODS[3], float("nan"), 0, "cpu")
