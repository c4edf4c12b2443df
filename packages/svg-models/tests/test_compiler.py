"""A sparse run under the compiler, and the operator that makes it one graph.

What else diffusers can do to a model is in `test_composition.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import composition
import pytest
import tiny
import torch
from torch import Tensor

from svg_attention import SVG2, Dense, Schedule
from svg_models import sparsify
from svg_models.families import fused

pytestmark = pytest.mark.usefixtures("one_thread")
ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)
SPARSE = SVG2(q_clusters=6, k_clusters=12, top_p=0.6, first_iterations=2)


def graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@pytest.fixture
def fresh_compiler() -> Any:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def test_sparsify_repeated_blocks_compile_to_one_graph(fresh_compiler: None) -> None:
    model, inputs = tiny.transformer(num_layers=10), tiny.forward_inputs()

    def forward(step: int) -> Tensor:
        with torch.no_grad(), model.cache_context("cond", step_index=step, num_inference_steps=4):
            return model(**inputs)[0]

    expected = forward(0)
    with sparsify(model, SPARSE, ALWAYS_SPARSE):
        eager = [forward(step) for step in range(2)]
    with sparsify(model, SPARSE, Schedule(dense_steps=0.5, dense_layers=0.0)) as run:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(forward(0), expected, rtol=0.0, atol=1e-6)
        forward(1), forward(2), forward(3)  # steps 2 and 3 are sparse
        assert graphs() == 1
        assert {r.method for r in run.stats().records if r.step == 3} == {"SVG2"}
    with sparsify(model, SPARSE, ALWAYS_SPARSE):
        compiled = [forward(step) for step in range(2)]
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward(0), expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "kernel"),
    [("Wan", "qk_norm_rope"), ("HunyuanVideo", "qk_norm_rope"), ("CogVideoX", "rope")],
)
def test_sparsify_the_kernel_for_queries_and_keys_is_part_of_the_graph(
    family: str, kernel: str, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's kernels serve, says the test; their reference tier computes for them."""
    monkeypatch.setattr(fused, "serves", torch.compiler.assume_constant_result(lambda device: True))
    found: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    player = composition.recorded(family).fresh(2)
    with sparsify(player.transformer, SPARSE, ALWAYS_SPARSE) as run:
        eager = player.play()
        for slot in run._engine.slots:
            block = player.transformer.get_submodule(slot.path.rpartition(".")[0])
            block.compile(fullgraph=True, backend=backend)
        torch.testing.assert_close(player.play(), eager, rtol=1e-4, atol=1e-5)
    assert any(name.startswith(f"svg_kernels.{kernel}") for name in found)


@pytest.mark.gpu
def test_sparsify_repeated_blocks_by_the_default_compiler(
    fresh_compiler: None, assert_accurate: Callable[..., None]
) -> None:
    model = tiny.transformer(num_layers=2, attention_head_dim=64).to("cuda")
    inputs = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in tiny.forward_inputs().items()}

    def forward(step: int = 0) -> Tensor:
        with torch.no_grad(), model.cache_context("cond", step_index=step, num_inference_steps=2):
            return model(**inputs)[0]

    exact = forward().double()
    model.to(torch.bfloat16)
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].bfloat16()
    eager = forward()
    with sparsify(model, SPARSE, Schedule(dense_steps=0.5, dense_layers=0.0)) as run:
        model.compile_repeated_blocks(fullgraph=True)
        assert_accurate(forward(0), eager, exact)
        assert torch.isfinite(forward(1)).all()
        assert graphs() == 1
    assert [r.method for r in run.stats().records] == ["Dense"] * 2 + ["SVG2"] * 2


@pytest.mark.parametrize("whole", [False, True])
def test_sparsify_a_further_run_finds_what_the_first_has_compiled(
    whole: bool, fresh_compiler: None
) -> None:
    pipe = tiny.pipeline()
    if whole:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        for block in pipe.transformer.blocks:
            block.compile(fullgraph=True, backend="eager")

    def clip() -> torch.Tensor:
        with sparsify(pipe, SPARSE, ALWAYS_SPARSE):
            return tiny.generate(pipe, num_inference_steps=2)

    first = clip()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(clip(), first)


def test_sparsify_a_wholly_compiled_pipeline(fresh_compiler: None) -> None:
    pipe = tiny.pipeline()
    reference = tiny.generate(pipe, num_inference_steps=2)
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    with sparsify(pipe, Dense(), ALWAYS_SPARSE) as run:
        video = tiny.generate(pipe, num_inference_steps=2)
        assert [record.step for record in run.stats().records] == [0] * 6 + [1] * 6
    torch.testing.assert_close(video, reference, rtol=0.0, atol=1e-5)


def test_attention_op_is_well_formed() -> None:
    class Answer:
        def attend(self, slot: int, query: Tensor, *others: Tensor) -> Tensor:
            return query.flip(1) * slot

    from svg_models import attention_op

    answer = Answer()
    handle = attention_op.make_handle(attention_op.register(answer), 3)
    query, key, value = torch.randn(3, 2, 7, 2, 4).unbind(0)
    assert torch.equal(attention_op.attention(query, key, value, handle), query.flip(1) * 3)
    torch.library.opcheck(
        torch.ops.svg_models.self_attention.default,
        (query, key, value, handle),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
