"""The promise of `sparsify`: one line in, nothing left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from svg_attention import SVG2, Dense, Schedule, UnsupportedError
from svg_models import attention_op, sparsify

pytestmark = pytest.mark.usefixtures("one_thread")
ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)
SPARSE = SVG2(q_clusters=6, k_clusters=12, top_p=0.6, first_iterations=4)


@pytest.fixture(scope="module")
def reference(one_thread: None) -> torch.Tensor:
    """Latents of a pipeline that this package never touched."""
    return tiny.generate(tiny.pipeline())


def attributes(pipe: Any) -> dict[str, Any]:
    """Name every attribute of every module, down to the entries of its dictionaries."""
    found: dict[str, Any] = {}
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        for path, module in model.named_modules() if model is not None else ():
            for key, value in vars(module).items():
                found[f"{name}.{path}.{key}"] = value
                if isinstance(value, dict):
                    for inner, entry in value.items():
                        found[f"{name}.{path}.{key}[{inner}]"] = entry
    return found


def assert_same_attributes(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert after.keys() == before.keys()
    moved = [name for name in before if after[name] is not before[name]]
    assert moved == []


@pytest.mark.parametrize(
    ("method", "schedule"),
    [
        pytest.param(Dense(), ALWAYS_SPARSE, id="dense method"),
        pytest.param(SPARSE, Schedule(dense_steps=1.0), id="every step dense"),
        pytest.param(SPARSE, Schedule(dense_steps=0.0, dense_layers=1.0), id="every layer dense"),
    ],
)
def test_dense_calls_give_the_bits_of_the_stock_processor(method, schedule, reference) -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, method, schedule) as run:
        assert torch.equal(tiny.generate(pipe), reference)
    stats = run.stats()
    assert len(stats.records) == 4 * 2 * 3
    assert stats.mean_density == stats.mean_density_with_dense_calls == 1.0


def test_the_operator_takes_what_autocast_leaves_in_different_dtypes() -> None:
    class Sum:
        def attend(self, slot, query, key, value):
            return query + key + value

    run = Sum()
    handle = attention_op.make_handle(attention_op.register(run), 0)
    query, value = torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_op.attention(query, query, value, handle)
    assert out.dtype == torch.bfloat16
    assert (out == 3).all()


def test_autocast_rules_over_attention_as_over_the_stock_processor() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = tiny.generate(tiny.pipeline(), num_inference_steps=2)
        pipe = tiny.pipeline()
        with sparsify(pipe, Dense()):
            assert torch.equal(tiny.generate(pipe, num_inference_steps=2), stock)
        with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
            video = tiny.generate(pipe, num_inference_steps=2)
    assert torch.isfinite(video).all()
    assert not torch.equal(video, stock)
    assert run.stats().mean_density < 0.95


def test_density_one_is_dense_within_rounding(reference) -> None:
    pipe = tiny.pipeline()
    full = SVG2(q_clusters=6, k_clusters=12, density=1.0, first_iterations=4)
    with sparsify(pipe, full, ALWAYS_SPARSE) as run:
        torch.testing.assert_close(tiny.generate(pipe), reference, rtol=1e-3, atol=1e-4)
    assert run.stats().mean_density == pytest.approx(1.0)


def test_sparse_output_is_different_finite_and_bounded(reference) -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        video = tiny.generate(pipe)
    assert torch.isfinite(video).all()
    assert video.abs().max() < 4 * reference.abs().max()
    assert not torch.allclose(video, reference, atol=1e-3)
    assert 0.1 < run.stats().mean_density < 0.95


def test_same_seed_gives_the_same_video_and_another_seed_another() -> None:
    def video(seed: int) -> torch.Tensor:
        pipe = tiny.pipeline()
        with sparsify(pipe, SPARSE, ALWAYS_SPARSE, seed=seed):
            return tiny.generate(pipe)

    first = video(0)
    assert torch.equal(first, video(0))
    assert not torch.equal(first, video(1))


def test_two_videos_in_a_row_equal_two_fresh_runs() -> None:
    def fresh(noise: int) -> torch.Tensor:
        pipe = tiny.pipeline()
        with sparsify(pipe, SPARSE, ALWAYS_SPARSE):
            return tiny.generate(pipe, seed=noise)

    pipe = tiny.pipeline()
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        first, second = tiny.generate(pipe, seed=0), tiny.generate(pipe, seed=1)
    assert torch.equal(first, fresh(0))
    assert torch.equal(second, fresh(1))
    assert len(run.stats().records) == 4 * 2 * 3


def test_a_video_after_an_interrupted_one_starts_afresh() -> None:
    def stop(pipe: Any, step: int, timestep: Any, arguments: dict) -> dict:
        raise KeyboardInterrupt

    pipe = tiny.pipeline()
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE):
        alone = tiny.generate(pipe)
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE):
        with pytest.raises(KeyboardInterrupt):
            tiny.generate(pipe, seed=7, num_inference_steps=9, callback_on_step_end=stop)
        assert torch.equal(tiny.generate(pipe), alone)


def test_restore_leaves_no_trace_without_a_run() -> None:
    pipe = tiny.pipeline()
    before = attributes(pipe)
    sparsify(pipe, SPARSE).restore()
    assert_same_attributes(before, attributes(pipe))


def test_restore_leaves_no_trace_after_a_run(reference) -> None:
    pipe = tiny.pipeline()
    before = attributes(pipe)
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        tiny.generate(pipe)
    assert_same_attributes(before, attributes(pipe))
    assert not run.active
    assert torch.equal(tiny.generate(pipe), reference)


def test_restore_keeps_hooks_that_diffusers_had_before(reference) -> None:
    pipe = tiny.pipeline()
    tiny.generate(pipe)  # the pipeline itself makes a hook registry on the transformer
    before = attributes(pipe)
    assert "transformer.._diffusers_hook" in before
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE):
        tiny.generate(pipe)
    assert_same_attributes(before, attributes(pipe))
    assert torch.equal(tiny.generate(pipe), reference)


def test_restore_twice_is_harmless_and_stats_outlive_it() -> None:
    pipe = tiny.pipeline()
    run = sparsify(pipe, SPARSE, ALWAYS_SPARSE)
    tiny.generate(pipe)
    during = run.stats()
    run.restore()
    run.restore()
    assert run.stats() == during


def test_an_error_inside_the_block_restores_too() -> None:
    pipe = tiny.pipeline()
    before = attributes(pipe)
    with pytest.raises(ZeroDivisionError), sparsify(pipe, SPARSE):
        raise ZeroDivisionError
    assert_same_attributes(before, attributes(pipe))


def test_settings_made_meanwhile_stay_on_the_stock_processors() -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, Dense()):
        for block in pipe.transformer.blocks:
            block.attn1.processor._attention_backend = "native"
    assert [b.attn1.processor._attention_backend for b in pipe.transformer.blocks] == ["native"] * 3


def test_two_pipelines_in_one_process_do_not_see_each_other(reference) -> None:
    one, other, third = tiny.pipeline(), tiny.pipeline(), tiny.pipeline()
    with sparsify(one, SPARSE, ALWAYS_SPARSE) as first, sparsify(third, Dense(), ALWAYS_SPARSE):
        alone = tiny.generate(one)
        assert torch.equal(tiny.generate(other), reference)
        assert torch.equal(tiny.generate(third), reference)
        assert torch.equal(tiny.generate(one), alone)
        assert {record.method for record in first.stats().records} == {"SVG2"}


def test_sparsify_twice_is_refused_and_the_first_run_stays() -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        with pytest.raises(ValueError, match=r"sparse already .* restore\(\)"):
            sparsify(pipe)
        tiny.generate(pipe)
        assert run.stats().mean_density < 1.0
    sparsify(pipe, Dense()).restore()


class Unheard(nn.Module):
    """A transformer of no family."""


class SomePipeline:
    def __init__(self) -> None:
        self.transformer = Unheard()


def test_unknown_pipeline_names_the_known_families_and_the_way_to_add_one() -> None:
    with pytest.raises(ValueError, match=r"Unheard.*WanTransformer3DModel.*Adding a model"):
        sparsify(SomePipeline())


def test_something_else_than_a_pipeline_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a diffusers video pipeline.*got dict"):
        sparsify({})


class ForeignProcessor:
    def __call__(self, attn: Any, hidden_states: torch.Tensor, *others: Any) -> torch.Tensor:
        return hidden_states


def test_a_processor_that_is_not_reproduced_is_refused_and_nothing_changes() -> None:
    first, second = tiny.transformer(), tiny.transformer()
    second.blocks[1].attn1.set_processor(ForeignProcessor())
    pipe = tiny.pipeline(first, second, boundary_ratio=0.5)
    before = attributes(pipe)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1, got ForeignProcessor"):
        sparsify(pipe)
    assert_same_attributes(before, attributes(pipe))


def test_processors_replaced_afterwards_are_told_and_left_in_place() -> None:
    pipe = tiny.pipeline()
    foreign = ForeignProcessor()
    run = sparsify(pipe, SPARSE, ALWAYS_SPARSE)
    pipe.transformer.blocks[1].attn1.set_processor(foreign)
    with pytest.warns(UserWarning, match=r"1 of 3 .* replaced after sparsify, first at blocks\.1"):
        tiny.generate(pipe)
    with pytest.warns(UserWarning, match="restore left them in place"):
        run.restore()
    assert pipe.transformer.blocks[1].attn1.processor is foreign
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_a_deep_copy_is_a_dense_pipeline_of_its_own(reference) -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        sparse = tiny.generate(pipe)
        twin = copy.deepcopy(pipe)
        calls = len(run.stats().records)
        assert torch.equal(tiny.generate(twin), reference)
        assert len(run.stats().records) == calls
        twin.transformer.patch_embedding.weight.data.mul_(0.5)
        assert torch.equal(tiny.generate(pipe), sparse)
        with sparsify(twin, SPARSE, ALWAYS_SPARSE) as other:
            tiny.generate(twin)
            assert other.stats().mean_density < 1.0
    assert torch.equal(tiny.generate(pipe), reference)


def test_a_dropped_run_lives_as_long_as_its_pipeline() -> None:
    pipe = tiny.pipeline()
    number = sparsify(pipe, SPARSE, ALWAYS_SPARSE)._engine.number
    gc.collect()
    tiny.generate(pipe)
    model = weakref.ref(pipe.transformer)
    assert number in attention_op._runs
    del pipe
    gc.collect()
    assert model() is None
    assert number not in attention_op._runs


def test_a_run_outlives_its_pipeline() -> None:
    pipe = tiny.pipeline()
    run = sparsify(pipe, Dense())
    tiny.generate(pipe)
    del pipe
    gc.collect()
    assert len(run.stats().records) == 24
    run.restore()


def test_a_part_of_a_sparse_transformer_called_alone_says_what_to_call() -> None:
    model = tiny.transformer()
    with sparsify(model, Dense()), pytest.raises(RuntimeError, match="call the transformer itself"):
        model.blocks[0].attn1(torch.zeros(1, 8, 24))


def test_a_stale_processor_says_that_its_run_has_ended() -> None:
    model = tiny.transformer()
    run = sparsify(model, Dense())
    stale = model.blocks[0].attn1.processor
    run.restore()
    del run
    gc.collect()
    model.blocks[0].attn1.set_processor(stale)
    with pytest.raises(RuntimeError, match="a sparse run that has ended"):
        model(**tiny.forward_inputs())


def test_a_transformer_alone_is_sparse_inside_a_cache_context_and_dense_outside() -> None:
    model, inputs = tiny.transformer(), tiny.forward_inputs()
    with torch.no_grad(), sparsify(model, SPARSE, ALWAYS_SPARSE) as run:
        with model.cache_context("cond", step_index=0, num_inference_steps=10):
            model(**inputs)
        assert {record.method for record in run.stats().records} == {"SVG2"}
        with pytest.warns(UserWarning, match="cannot tell the denoising step"):
            model(**inputs)
        assert run.stats().records[-1].method == "Dense"
        assert len(run.messages) == 1


def test_stats_group_by_step_and_layer() -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, SPARSE, Schedule(dense_steps=0.5, dense_layers=0.4), profile=True) as run:
        tiny.generate(pipe)
    stats = run.stats()
    by_step, by_layer = stats.density_by_step, stats.density_by_layer
    assert list(by_step) == [0, 1, 2, 3]
    assert list(by_layer) == [0, 1, 2]
    assert by_step[0] == by_step[1] == 1.0
    assert by_layer[0] == 1.0
    assert max(by_step[2], by_step[3], by_layer[1], by_layer[2]) < 1.0
    assert len(stats.sparse_records) == 2 * 2 * 2
    total = sum(record.density for record in stats.sparse_records)
    assert stats.mean_density == pytest.approx(total / 8)
    assert stats.mean_density < stats.mean_density_with_dense_calls < 1.0
    assert stats.seconds is not None
    assert stats.seconds > 0.0
    as_values = stats.to_dict()
    assert as_values["recipe"]["method"] == "SVG2"
    assert as_values["recipe"]["settings"]["q_clusters"] == 6
    assert len(as_values["records"]) == 24


def test_report_is_one_page_with_the_numbers_of_the_run(tmp_path) -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        tiny.generate(pipe, num_inference_steps=2)
    page = run.report(tmp_path / "new folder" / "report.html")
    text = page.read_text(encoding="utf-8")
    assert f"{100 * run.stats().mean_density:.0f}" in text
    assert "SVG2" in text


def test_ring_attention_is_refused_with_the_way_out() -> None:
    class Context:
        ring_degree, ulysses_degree = 2, 1

    class Config:
        context_parallel_config = Context()

    model = tiny.transformer()
    model._parallel_config = Config()
    with pytest.raises(UnsupportedError, match="ulysses_degree"):
        sparsify(model)
