"""What every family promises, over a tiny pipeline of each: exact when dense, and reversible."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import CASES, Case

from svg_attention import SVG1, SVG2, Dense, Method, Schedule
from svg_models import sparsify
from svg_models.families import family_of, transformers_of
from svg_models.stats import RunStats

pytestmark = pytest.mark.usefixtures("one_thread")
ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)
METHODS = {
    "SVG1": (SVG1(density=0.4, sampled_rows=16), SVG1(density=1.0)),
    "SVG2": (
        SVG2(q_clusters=4, k_clusters=12, top_p=0.6, first_iterations=2),
        SVG2(q_clusters=4, k_clusters=12, density=1.0, first_iterations=2),
    ),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def pipe(case: Case, one_thread: None) -> Any:
    """One pipeline for all tests of a case; that they leave it as it was is one of them."""
    return case.build()


@pytest.fixture(scope="module")
def stock(case: Case, pipe: Any) -> Tensor:
    """Latents of a pipeline that this package has not touched yet."""
    return case.run(pipe)


@dataclass(frozen=True)
class Outcome:
    """Two videos in a row, and what the run knew after the second."""

    name: str
    method: Method
    first: Tensor
    second: Tensor
    stats: RunStats
    sources: set[str]
    grids: set[tuple[int, int, int]]


@pytest.fixture(scope="module", params=METHODS)
def outcome(request: pytest.FixtureRequest, case: Case, pipe: Any, stock: Tensor) -> Outcome:
    method, _ = METHODS[request.param]
    contexts = []
    with sparsify(pipe, method, ALWAYS_SPARSE) as run:
        begin = run._engine.begin_forward
        run._engine.begin_forward = lambda name, context: (
            contexts.append(context),
            begin(name, context),
        )
        first, second = case.run(pipe, seed=0), case.run(pipe, seed=1)
        assert run.messages == ()
    return Outcome(
        name=request.param,
        method=method,
        first=first,
        second=second,
        stats=run.stats(),
        sources={context.moment.source for context in contexts},
        grids={context.grid for context in contexts},
    )


def in_fp64(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    backend: Any = None,
    key_lengths: tuple[int, ...] | None = None,
) -> Tensor:
    """Attend in fp64, with padding masked."""
    query, key, value = (x.double().transpose(1, 2) for x in (query, key, value))
    logits = query @ key.mT * query.shape[-1] ** -0.5
    if key_lengths is not None:
        valid = torch.arange(key.shape[2]) < torch.tensor(key_lengths)[:, None]
        logits = logits.where(valid[:, None, None], -torch.inf)
    return (logits.softmax(-1) @ value).float().transpose(1, 2)


@pytest.fixture(scope="module")
def exact(case: Case, pipe: Any, stock: Tensor) -> Tensor:
    """Latents with the self-attention of the video computed in fp64."""
    with sparsify(pipe, Dense(), ALWAYS_SPARSE) as run:
        slots = run._engine.slots
        slots[:] = [replace(slot, family=replace(slot.family, dense=in_fp64)) for slot in slots]
        return case.run(pipe).double()


def test_sparsify_dense_is_stock(
    case: Case, pipe: Any, stock: Tensor, exact: Tensor, assert_accurate: Callable[..., None]
) -> None:
    with sparsify(pipe, Dense(), ALWAYS_SPARSE) as run:
        video = case.run(pipe)
    assert run.stats().mean_density_with_dense_calls == 1.0
    if case.dense_is_exact:
        assert torch.equal(video, stock)
    else:
        assert_accurate(video, stock, exact, factor=4.0)


@pytest.mark.parametrize("name", METHODS)
def test_sparsify_density_one_is_dense(
    case: Case,
    pipe: Any,
    stock: Tensor,
    exact: Tensor,
    name: str,
    assert_accurate: Callable[..., None],
) -> None:
    _, full = METHODS[name]
    with sparsify(pipe, full, ALWAYS_SPARSE) as run:
        video = case.run(pipe)
    assert run.stats().mean_density == pytest.approx(1.0)
    # Errors grow from step to step in a way that no two kernels share.
    assert_accurate(video, stock, exact, factor=4.0)


def test_sparsify_sparse_differs_and_stays_bounded(stock: Tensor, outcome: Outcome) -> None:
    assert torch.isfinite(outcome.first).all()
    assert outcome.first.abs().max() < 4 * stock.abs().max()
    assert not torch.allclose(outcome.first, stock, rtol=1e-3, atol=1e-3)
    assert 0.1 < outcome.stats.mean_density < 0.95


def test_sparsify_restored_is_stock(case: Case, pipe: Any, stock: Tensor, outcome: Outcome) -> None:
    assert torch.equal(case.run(pipe), stock)


def test_sparsify_a_second_video_equals_a_fresh_run(
    case: Case, pipe: Any, outcome: Outcome
) -> None:
    with sparsify(pipe, outcome.method, ALWAYS_SPARSE):
        assert torch.equal(case.run(pipe, seed=1), outcome.second)


def test_sparsify_each_layer_branch_and_step_is_recorded_once(case: Case, outcome: Outcome) -> None:
    records = outcome.stats.records
    assert outcome.sources == {case.source}
    assert outcome.grids == {case.grid}
    frames, rows, columns = case.grid
    assert {r.tokens for r in records} == {frames * rows * columns + case.text_tokens}
    assert {r.method for r in records} == {outcome.name}
    found = [(r.step, r.branch, r.layer) for r in records]
    layers = case.layers.values()
    assert found == [
        (step, branch, layer)
        for step in range(case.steps)
        for branch in case.branches
        for layer in range(max(layers))
    ]
    assert {r.transformer for r in records} == set(case.layers)


def test_sparsify_density_is_told_by_step_and_layer(case: Case, outcome: Outcome) -> None:
    stats = json.loads(json.dumps(outcome.stats.to_dict()))
    assert list(stats["density_by_step"]) == [str(step) for step in range(case.steps)]
    assert len(stats["density_by_layer"]) == max(case.layers.values())
    densities = [*stats["density_by_step"].values(), *stats["density_by_layer"].values()]
    assert all(0.0 < density <= 1.0 for density in densities)


@pytest.mark.parametrize(
    "one", {case.family: case for case in CASES}.values(), ids=lambda case: case.family
)
def test_sparsify_the_report_of_each_family(one: Case, tmp_path: Path) -> None:
    own = one.build()
    with sparsify(own, METHODS["SVG2"][0], ALWAYS_SPARSE, profile=True) as run:
        one.run(own)
    page = run.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{run.stats().records[0].tokens:,} tokens" in page
    assert f"{one.steps} steps" in page
    assert f"{max(one.layers.values())} layers" in page
    assert f"branches: {', '.join(sorted(one.branches))}" in page


def test_sparsify_the_family_is_recognised(case: Case, pipe: Any) -> None:
    transformers = transformers_of(pipe)
    assert set(transformers) == set(case.layers)
    for name, transformer in transformers.items():
        family = family_of(transformer)
        assert (family.name, family.task(transformer)) == (case.family, case.task)
        assert len(family.find_attentions(transformer)) == case.layers[name]
