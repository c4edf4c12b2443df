from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from svg_attention import (
    SVG1,
    SVG2,
    SVGEAR,
    Dense,
    LayerMemory,
    Method,
    RandomBlocks,
    TokenLayout,
    method_from_dict,
    sparse_attention,
)

METHODS = [
    Dense(),
    SVG1(density=0.4, sampled_rows=8),
    SVG2(q_clusters=5, k_clusters=9, first_iterations=3),
    SVG2(q_clusters=5, k_clusters=9, density=0.4, compensate=True, route="error"),
    SVG2(
        q_clusters=5,
        k_clusters=9,
        density=0.4,
        compensate=True,
        route="error",
        correct_bias=True,
        repair_rows=64,
        metric="response",
        spend="call",
    ),
    SVGEAR(q_clusters=5, k_clusters=9, density=0.4),
    RandomBlocks(density=0.4),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_to_dict_and_back_is_the_same_method(method: Any) -> None:
    fields = json.loads(json.dumps(method.to_dict()))
    assert method_from_dict(fields) == method
    assert type(method).from_dict(fields) == method
    assert isinstance(method, Method)


def test_repr_is_the_call_that_makes_the_method() -> None:
    assert repr(SVG2()) == "SVG2()"
    assert repr(Dense()) == "Dense()"
    assert repr(SVG1(density=0.4)) == "SVG1(density=0.4)"
    for method in METHODS:
        assert eval(repr(method)) == method


def test_method_from_dict_refuses_unknown_and_foreign_settings() -> None:
    with pytest.raises(ValueError, match="unknown method 'SVG3'"):
        method_from_dict({"name": "SVG3"})
    with pytest.raises(ValueError, match="settings of 'Dense'"):
        SVG1.from_dict(Dense().to_dict())


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("text", [0, 30])
def test_plan_never_waits_for_the_device(
    method: Any, text: int, no_sync: Callable[[], Any]
) -> None:
    layout = TokenLayout(grid=(3, 10, 11), text_tokens=text)
    data = [torch.randn(2, 2, layout.tokens, 16) for _ in range(3)]
    lengths = torch.tensor([4, 30]) if text else None
    memory, generator = LayerMemory(), torch.Generator().manual_seed(0)
    with no_sync():
        for _ in range(2):
            plan = method.plan(
                *data, layout=layout, memory=memory, text_lengths=lengths, generator=generator
            )
            plan.density()
            if plan.summary is None:
                plan.rounded(8)


def test_no_sync_notices_a_wait(no_sync: Callable[[], Any]) -> None:
    x = torch.arange(3)
    with no_sync():
        with pytest.raises(AssertionError, match="waits for the device"):
            x.sum().item()
        with pytest.raises(AssertionError, match="waits for the device"):
            x[x > 1]
        with pytest.raises(AssertionError, match="waits for the device"):
            x.nonzero()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_plan_shapes_do_not_depend_on_the_data(method: Any) -> None:
    layout = TokenLayout(grid=(3, 10, 11), text_tokens=12)
    shapes = set()
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        data = [(seed + 1) * torch.randn(1, 2, layout.tokens, 16, generator=draw) for _ in range(3)]
        plan = method.plan(
            *data, layout=layout, memory=LayerMemory(), text_lengths=torch.tensor([4 * seed])
        )
        shapes.add(tuple(plan.run_starts.shape))
    assert len(shapes) == 1


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_plan_refuses_tensors_that_do_not_fit_the_layout(method: Any) -> None:
    layout = TokenLayout(grid=(3, 10, 11), text_tokens=12)
    data = [torch.randn(1, 2, 300, 16) for _ in range(3)]
    with pytest.raises(ValueError, match="has 342 tokens, but query has 300"):
        method.plan(*data, layout=layout, memory=LayerMemory())
    data = [torch.randn(1, 2, layout.tokens, 16) for _ in range(3)]
    with pytest.raises(ValueError, match="one number per batch item"):
        method.plan(*data, layout=layout, memory=LayerMemory(), text_lengths=torch.tensor([3, 4]))


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_plan_can_be_captured_in_a_graph(method: Any, device: torch.device) -> None:
    layout = TokenLayout(grid=(5, 16, 20), text_tokens=30)
    draw = torch.Generator(device=device).manual_seed(0)
    data = [torch.randn(2, 4, layout.tokens, 64, device=device, generator=draw) for _ in range(3)]
    lengths = torch.tensor([4, 30], device=device)
    memory = LayerMemory()

    def plan() -> Any:
        return method.plan(*data, layout=layout, memory=memory, text_lengths=lengths)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            plan()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan().density()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = plan()
        density = captured.density()
    graph.replay()
    torch.cuda.synchronize()
    assert 0.0 < density.min() <= density.max() <= 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("method", [m for m in METHODS if isinstance(m, SVG2)], ids=repr)
def test_plan_and_attention_are_captured_and_replayed_with_new_data(
    method: Any, device: torch.device
) -> None:
    layout = TokenLayout(grid=(5, 16, 20), text_tokens=30)
    draw = torch.Generator(device=device).manual_seed(0)
    shape = (3, 1, 4, layout.tokens, 64)
    data = torch.randn(shape, device=device, generator=draw).to(torch.bfloat16)
    first = LayerMemory()
    method.plan(*data, layout=layout, memory=first, generator=draw)

    def call() -> torch.Tensor:
        # Every call starts from the same centroids, as a step does from those of the one before.
        memory = replace(first)
        return sparse_attention(*data, method.plan(*data, layout=layout, memory=memory))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    data.copy_(torch.randn(shape, device=device, generator=draw))
    out.fill_(torch.nan)
    graph.replay()
    replayed = out.clone()
    assert torch.equal(replayed, call())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": None}, "query must be a torch.Tensor, got NoneType"),
        ({"value": [1]}, "value must be a torch.Tensor, got list"),
        ({"query": torch.zeros(1, 2, 12, 4, dtype=torch.int32)}, "of a floating dtype, got"),
        ({"query": torch.zeros(1, 0, 12, 4)}, "must have batch items, heads, tokens and channels"),
        ({"key": torch.zeros(1, 0, 12, 4), "value": torch.zeros(1, 0, 12, 4)}, "must have batch"),
        ({"layout": (3, 2, 2)}, r"layout must be a TokenLayout, got \(3, 2, 2\)"),
    ],
)
def test_plan_says_what_is_no_call(changes, message):
    row = torch.zeros(1, 2, 12, 4)
    given = {"query": row, "key": row, "value": row, "layout": TokenLayout(grid=(3, 2, 2))}
    given |= changes
    with pytest.raises((TypeError, ValueError), match=message):
        SVG2(density=0.5).plan(given["query"], given["key"], given["value"], layout=given["layout"])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (None, TypeError, "described by a mapping, got None"),
        ("svg2", TypeError, "described by a mapping"),
        ({"name": ["SVG2"]}, ValueError, "unknown method"),
        ({"name": "svg2"}, ValueError, "did you mean 'SVG2'"),
        ({"name": "SVG3"}, ValueError, "did you mean"),
    ],
)
def test_method_from_dict_says_what_is_no_description(values, error, message):
    with pytest.raises(error, match=message):
        method_from_dict(values)
