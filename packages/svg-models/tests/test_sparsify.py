"""The promise of `sparsify`: one line in, nothing left behind."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import svg_models
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
def test_sparsify_dense_calls_give_the_bits_of_the_stock_processor(
    method, schedule, reference
) -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, method, schedule) as run:
        assert torch.equal(tiny.generate(pipe), reference)
    stats = run.stats()
    assert len(stats.records) == 4 * 2 * 3
    assert stats.mean_density == stats.mean_density_with_dense_calls == 1.0


def test_attention_op_takes_what_autocast_leaves_in_different_dtypes() -> None:
    class Sum:
        def attend(self, slot, query, key, value):
            return query + key + value

        def tell(self, message):
            raise AssertionError(message)

    run = Sum()
    handle = attention_op.make_handle(attention_op.register(run), 0)
    query, value = torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_op.attention(query, query, value, handle)
    assert out.dtype == torch.bfloat16
    assert (out == 3).all()


def test_sparsify_autocast_rules_over_attention_as_over_the_stock_processor() -> None:
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


def test_sparsify_density_one_is_dense_within_rounding(reference) -> None:
    pipe = tiny.pipeline()
    full = SVG2(q_clusters=6, k_clusters=12, density=1.0, first_iterations=4)
    with sparsify(pipe, full, ALWAYS_SPARSE) as run:
        torch.testing.assert_close(tiny.generate(pipe), reference, rtol=1e-3, atol=1e-4)
    assert run.stats().mean_density == pytest.approx(1.0)


def test_sparsify_sparse_output_is_different_finite_and_bounded(reference) -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        video = tiny.generate(pipe)
    assert torch.isfinite(video).all()
    assert video.abs().max() < 4 * reference.abs().max()
    assert not torch.allclose(video, reference, atol=1e-3)
    assert 0.1 < run.stats().mean_density < 0.95


def test_sparsify_same_seed_gives_the_same_video_and_another_seed_another() -> None:
    def video(seed: int) -> torch.Tensor:
        pipe = tiny.pipeline()
        with sparsify(pipe, SPARSE, ALWAYS_SPARSE, seed=seed):
            return tiny.generate(pipe)

    first = video(0)
    assert torch.equal(first, video(0))
    assert not torch.equal(first, video(1))


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), torch.tensor(3)])
def test_sparsify_a_seed_of_another_library_is_that_number(seed: Any) -> None:
    def video(given: Any) -> torch.Tensor:
        pipe = tiny.pipeline()
        with sparsify(pipe, SPARSE, ALWAYS_SPARSE, seed=given):
            return tiny.generate(pipe, num_inference_steps=1)

    assert torch.equal(video(seed), video(3))


def test_sparsify_two_videos_in_a_row_equal_two_fresh_runs() -> None:
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


def test_sparsify_a_video_after_an_interrupted_one_starts_afresh() -> None:
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


def test_sparsify_an_error_inside_the_block_restores_too() -> None:
    pipe = tiny.pipeline()
    before = attributes(pipe)
    with pytest.raises(ZeroDivisionError), sparsify(pipe, SPARSE):
        raise ZeroDivisionError
    assert_same_attributes(before, attributes(pipe))


def test_sparsify_settings_made_meanwhile_stay_on_the_original_processors() -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, Dense()):
        for block in pipe.transformer.blocks:
            block.attn1.processor._attention_backend = "native"
    assert [b.attn1.processor._attention_backend for b in pipe.transformer.blocks] == ["native"] * 3


def test_sparsify_two_pipelines_in_one_process_do_not_see_each_other(reference) -> None:
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
        with pytest.raises(ValueError, match=r"sparse already .*restore\(pipe\)"):
            sparsify(pipe)
        tiny.generate(pipe)
        assert run.stats().mean_density < 1.0
    sparsify(pipe, Dense()).restore()


class Unheard(nn.Module):
    """A transformer of no family."""


class SomePipeline:
    def __init__(self) -> None:
        self.transformer = Unheard()


def test_sparsify_names_the_known_families_and_the_way_to_add_one() -> None:
    with pytest.raises(ValueError, match=r"Unheard.*WanTransformer3DModel.*Adding a model"):
        sparsify(SomePipeline())


def test_sparsify_something_else_than_a_pipeline_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a diffusers video pipeline.*got dict"):
        sparsify({})


class ForeignProcessor:
    def __call__(self, attn: Any, hidden_states: torch.Tensor, *others: Any) -> torch.Tensor:
        return hidden_states


def test_sparsify_a_processor_that_is_not_reproduced_is_refused_and_nothing_changes() -> None:
    first, second = tiny.transformer(), tiny.transformer()
    second.blocks[1].attn1.set_processor(ForeignProcessor())
    pipe = tiny.pipeline(first, second, boundary_ratio=0.5)
    before = attributes(pipe)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1, got ForeignProcessor"):
        sparsify(pipe)
    assert_same_attributes(before, attributes(pipe))


def test_sparsify_processors_replaced_afterwards_are_told_and_left_in_place() -> None:
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


def test_sparsify_a_deep_copy_is_a_dense_pipeline_of_its_own(reference) -> None:
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


def test_sparsify_a_dropped_run_lives_as_long_as_its_pipeline() -> None:
    pipe = tiny.pipeline()
    number = sparsify(pipe, SPARSE, ALWAYS_SPARSE)._engine.number
    gc.collect()
    tiny.generate(pipe)
    model = weakref.ref(pipe.transformer)
    assert number in attention_op._owners
    del pipe
    gc.collect()
    assert model() is None
    assert number not in attention_op._owners


def test_sparsify_a_run_outlives_its_pipeline() -> None:
    pipe = tiny.pipeline()
    run = sparsify(pipe, Dense())
    tiny.generate(pipe)
    del pipe
    gc.collect()
    assert len(run.stats().records) == 24
    run.restore()


def test_sparsify_a_part_of_a_sparse_transformer_called_alone_says_what_to_call() -> None:
    model = tiny.transformer()
    with sparsify(model, Dense()), pytest.raises(RuntimeError, match="call the transformer itself"):
        model.blocks[0].attn1(torch.zeros(1, 8, 24))


def test_sparsify_a_stale_processor_says_that_its_run_has_ended() -> None:
    model = tiny.transformer()
    run = sparsify(model, Dense())
    stale = model.blocks[0].attn1.processor
    run.restore()
    del run
    gc.collect()
    model.blocks[0].attn1.set_processor(stale)
    with pytest.raises(RuntimeError, match="a sparse run that has ended"):
        model(**tiny.forward_inputs())


def test_sparsify_a_transformer_alone_is_sparse_inside_a_cache_context_and_dense_outside() -> None:
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


def test_sparsify_ring_attention_is_refused_with_the_way_out() -> None:
    class Context:
        ring_degree, ulysses_degree = 2, 1

    class Config:
        context_parallel_config = Context()

    model = tiny.transformer()
    model._parallel_config = Config()
    with pytest.raises(UnsupportedError, match="ulysses_degree"):
        sparsify(model)


def steps_of(run: Any) -> dict[int | None, set[str]]:
    """Return the methods that ran in each step of the last video."""
    found: dict[int | None, set[str]] = {}
    for record in run.stats().records:
        found.setdefault(record.step, set()).add(record.method)
    return found


HALF = Schedule(dense_steps=0.5, dense_layers=0.0)


def sibling(pipe: Any) -> Any:
    """Return a pipeline of the same weights with a scheduler of its own, as servers keep it."""
    parts = pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)}
    twin = type(pipe)(**parts)
    twin.set_progress_bar_config(disable=True)
    return twin


def test_sparsify_gives_a_second_pipeline_its_own_dense_steps() -> None:
    pipe = tiny.pipeline()
    twin = sibling(pipe)
    with sparsify(pipe, SPARSE, HALF) as run:
        tiny.generate(pipe, num_inference_steps=4)
        assert steps_of(run) == {0: {"Dense"}, 1: {"Dense"}, 2: {"SVG2"}, 3: {"SVG2"}}
        tiny.generate(twin, num_inference_steps=6)
        assert steps_of(run) == {s: {"Dense"} if s < 3 else {"SVG2"} for s in range(6)}
        tiny.generate(pipe, num_inference_steps=2)
        assert steps_of(run) == {0: {"Dense"}, 1: {"SVG2"}}
    assert run.messages == ()


def test_sparsify_keeps_two_pipelines_on_two_threads_apart() -> None:
    def alone(size: int) -> torch.Tensor:
        pipe = tiny.pipeline()
        with sparsify(pipe, SPARSE, HALF):
            return tiny.generate(pipe, height=size, width=size)

    expected = {size: alone(size) for size in (48, 32)}
    pipe = tiny.pipeline()
    pipes = {48: pipe, 32: sibling(pipe)}
    videos: dict[int, Any] = {}

    def work(size: int) -> None:
        try:
            videos[size] = [tiny.generate(pipes[size], height=size, width=size) for _ in range(3)]
        except Exception as error:  # noqa: BLE001 - shown by the assertion below
            videos[size] = error

    with sparsify(pipe, SPARSE, HALF) as run:
        threads = [threading.Thread(target=work, args=(size,)) for size in pipes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert run.messages == ()
    for size, clips in videos.items():
        assert isinstance(clips, list), clips
        assert all(torch.equal(clip, expected[size]) for clip in clips)


SCHEDULERS = {
    "FlowMatchHeunDiscreteScheduler": 2,
    "HeunDiscreteScheduler": 2,
    "KDPM2DiscreteScheduler": 2,
    "KDPM2AncestralDiscreteScheduler": 2,
    "FlowMatchEulerDiscreteScheduler": 1,
    "UniPCMultistepScheduler": 1,
    "DPMSolverMultistepScheduler": 1,
    "DPMSolverSinglestepScheduler": 1,
    "SASolverScheduler": 1,
    "DEISMultistepScheduler": 1,
    "LMSDiscreteScheduler": 1,
    "EulerAncestralDiscreteScheduler": 1,
}
"""Scheduler and how often it evaluates the transformer in a step, but for the last."""


@pytest.mark.parametrize("steps", [4, 5])
@pytest.mark.parametrize(("scheduler", "evaluations"), SCHEDULERS.items())
def test_sparsify_keeps_the_dense_share_of_steps_with_every_scheduler(
    scheduler: str, evaluations: int, steps: int
) -> None:
    if scheduler == "LMSDiscreteScheduler":
        pytest.importorskip("scipy", reason="diffusers asks for it")
    pipe = tiny.pipeline()
    pipe.scheduler = getattr(diffusers, scheduler)()
    with sparsify(pipe, SPARSE, HALF) as run:
        tiny.generate(pipe, num_inference_steps=steps)
    assert steps_of(run) == {s: {"Dense"} if s < 2 else {"SVG2"} for s in range(steps)}
    calls = evaluations * (steps - 1) + 1
    assert len(run.stats().records) == calls * 2 * 3  # evaluations, branches, layers
    assert run.messages == ()


@pytest.mark.parametrize("scheduler", ["KDPM2DiscreteScheduler", "UniPCMultistepScheduler"])
def test_sparsify_keeps_the_dense_share_of_the_steps_that_video_to_video_takes(
    scheduler: str,
) -> None:
    parts = tiny.pipeline().components
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = diffusers.WanVideoToVideoPipeline(**{name: parts[name] for name in names})
    pipe.scheduler = getattr(diffusers, scheduler)()
    pipe.set_progress_bar_config(disable=True)
    video = [Image.new("RGB", (48, 48)) for _ in range(9)]
    with sparsify(pipe, SPARSE, HALF) as run:
        tiny.generate(pipe, video=video, num_frames=None, strength=0.6, num_inference_steps=10)
    assert steps_of(run) == {s: {"Dense"} if s < 3 else {"SVG2"} for s in range(6)}


def test_sparsify_starts_afresh_after_an_interruption_in_the_first_step() -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE):
        alone = tiny.generate(pipe)
    guide = pipe.transformer.blocks[2].register_forward_hook(lambda *_: 1 / 0)
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE):
        with pytest.raises(ZeroDivisionError):
            tiny.generate(pipe, seed=7)
        guide.remove()
        assert torch.equal(tiny.generate(pipe), alone)


def test_sparsify_forgets_between_one_step_videos_of_a_transformer_alone() -> None:
    def clip(model: nn.Module, seed: int) -> torch.Tensor:
        with torch.no_grad(), model.cache_context("cond", step_index=0, num_inference_steps=1):
            out: torch.Tensor = model(**tiny.forward_inputs(seed=seed))[0]
            return out

    model = tiny.transformer()
    with sparsify(model, SPARSE, ALWAYS_SPARSE):
        fresh = clip(model, 2)
    with sparsify(model, SPARSE, ALWAYS_SPARSE) as run:
        clip(model, 1)
        assert torch.equal(clip(model, 2), fresh)
        assert len(run.stats().records) == 3


def test_sparsify_says_when_the_transformer_of_the_pipeline_was_replaced() -> None:
    pipe = tiny.pipeline(tiny.transformer(), tiny.transformer(), boundary_ratio=0.5)
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE):
        pipe.transformer_2 = tiny.transformer()
        with pytest.warns(UserWarning, match="transformer_2 of the pipeline was replaced"):
            tiny.generate(pipe)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (dict(method="svg3"), ValueError, "got 'svg3'; did you mean 'svg2'"),
        (dict(method=SVG2), TypeError, r"the class SVG2; give one: SVG2\(\)"),
        (dict(method=0.3), TypeError, r"such as SVG2\(\), got float 0.3"),
        (dict(schedule=0.2), TypeError, r"Schedule\(dense_steps=0.2\), got float"),
        (dict(schedule=Schedule), TypeError, "the class Schedule"),
        (dict(backend="cuda9"), ValueError, "got 'cuda9'; did you mean 'cuda'"),
        (dict(backend="flashinfer"), UnsupportedError, "flashinfer"),
        (dict(densty=0.2), TypeError, "no setting 'densty'; did you mean 'density'"),
        (dict(method="svg2@0.3", density=0.2), ValueError, "give one of them"),
        (dict(method="svg2", density=0.2, top_p=0.9), ValueError, "give one of them"),
        (dict(method="dense", density=0.2), ValueError, "has no density, got 0.2"),
        (dict(method=SPARSE, density=0.2), ValueError, "a method that has its own settings"),
        (dict(seed="x"), ValueError, "seed must be a whole number, got 'x'"),
        (dict(seed=1.5), ValueError, "seed must be a whole number, got 1.5"),
        (dict(seed=None), ValueError, "seed must be a whole number, got None"),
        (dict(seed=True), ValueError, "seed must be a whole number, got True"),
        (dict(seed=-1), ValueError, "from 0 to 2.64 - 1, got -1"),
        (dict(seed=2**64), ValueError, "from 0 to 2.64 - 1, got"),
        (dict(profile="yes"), ValueError, "profile must be True or False, got 'yes'"),
        (dict(backend=["cuda"]), ValueError, r"backend must be one of .*, got \['cuda'\]"),
        (dict(method="svg2", density=20), ValueError, "above 0 and at most 1, got 20"),
    ],
)
def test_sparsify_refuses_when_it_is_called(arguments, error, sentence) -> None:
    pipe = tiny.pipeline()
    before = attributes(pipe)
    with pytest.raises(error, match=sentence):
        sparsify(pipe, **arguments)
    assert_same_attributes(before, attributes(pipe))


def test_sparsify_takes_a_method_by_name() -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, "svg2-error", ALWAYS_SPARSE, density=0.3) as run:
        tiny.generate(pipe, num_inference_steps=1)
    assert run.recipe is not None
    assert run.recipe.method.density == 0.3
    assert run.recipe.method.route == "error"
    assert run.recipe.schedule == ALWAYS_SPARSE
    assert 0.1 < run.stats().mean_density <= 0.35


def test_sparsify_from_two_threads_lets_one_win() -> None:
    pipe, told, runs = tiny.pipeline(), [], []

    def work() -> None:
        try:
            runs.append(sparsify(pipe, SPARSE))
        except ValueError as error:
            told.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1
    assert len(told) == 3
    assert all("is sparse already" in sentence for sentence in told)
    runs[0].restore()


def test_sparsify_interrupted_leaves_nothing_behind(monkeypatch) -> None:
    pipe = tiny.pipeline()
    before = attributes(pipe)
    kind = type(pipe.transformer.blocks[2].attn1)
    set_processor, seen = kind.set_processor, []

    def interrupted(self: Any, processor: Any) -> None:
        seen.append(processor)
        if len(seen) == 3:
            raise KeyboardInterrupt
        set_processor(self, processor)

    monkeypatch.setattr(kind, "set_processor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sparsify(pipe, SPARSE)
    assert_same_attributes(before, attributes(pipe))


def test_restore_needs_no_run(reference) -> None:
    pipe = tiny.pipeline()
    before = attributes(pipe)
    svg_models.restore(pipe)  # is not sparse: nothing happens
    sparsify(pipe, SPARSE, ALWAYS_SPARSE)
    gc.collect()
    svg_models.restore(pipe)
    assert_same_attributes(before, attributes(pipe))
    assert torch.equal(tiny.generate(pipe), reference)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_sparsify_leaves_a_pickle_dense(how: str) -> None:
    pipe = tiny.pipeline()
    inputs = tiny.forward_inputs()
    with torch.no_grad():
        expected = pipe.transformer(**inputs)[0]
        with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
            tiny.generate(pipe, num_inference_steps=1)
            if how == "pickle":
                twin = pickle.loads(pickle.dumps(pipe.transformer))
            else:
                torch.save(pipe.transformer, file := io.BytesIO())
                file.seek(0)
                twin = torch.load(file, weights_only=False)
            calls = len(run.stats().records)
            assert torch.equal(twin(**inputs)[0], expected)
            assert len(run.stats().records) == calls
    with sparsify(twin, SPARSE, ALWAYS_SPARSE):
        pass
    assert type(twin.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


class Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [Dense(), SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("mode", [AttentionScoreSkipFunctionMode, Watcher])
def test_sparsify_a_mode_around_attention_has_its_effect(method: Any, mode: Any) -> None:
    model, inputs = tiny.transformer(), tiny.forward_inputs()

    def out() -> torch.Tensor:
        with torch.no_grad(), model.cache_context("cond", step_index=1, num_inference_steps=4):
            with mode():
                result: torch.Tensor = model(**inputs)[0]
                return result

    expected = out()
    with sparsify(model, method, ALWAYS_SPARSE) as run:
        with pytest.warns(UserWarning, match=f"{mode.__name__} may change or watch"):
            assert torch.equal(out(), expected)
        assert run.stats().records == ()


def test_sparsify_a_default_device_is_no_mode_around_attention() -> None:
    model = tiny.transformer()
    with sparsify(model, SPARSE, ALWAYS_SPARSE) as run, torch.no_grad(), torch.device("cpu"):
        with model.cache_context("cond", step_index=1, num_inference_steps=4):
            model(**tiny.forward_inputs())
    assert {record.method for record in run.stats().records} == {"SVG2"}
    assert run.messages == ()


def test_sparsify_takes_wrappers_off() -> None:
    pipe = tiny.pipeline()
    inner = pipe.transformer
    object.__setattr__(pipe, "transformer", nn.DataParallel(torch.compile(inner)))
    with sparsify(pipe, SPARSE) as run:
        assert type(inner.blocks[0].attn1.processor).__name__ == "SparseWanProcessor"
    assert not run.active
    assert type(inner.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


class PassingOn(WanTransformer3DModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_sparsify_reads_arguments_by_position_through_a_subclass() -> None:
    config = {k: v for k, v in tiny.transformer().config.items() if not k.startswith("_")}
    model, inputs = PassingOn(**config).eval(), tiny.forward_inputs()
    with sparsify(model, SPARSE, ALWAYS_SPARSE) as run, torch.no_grad():
        with model.cache_context("cond", step_index=1, num_inference_steps=4):
            model(inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"])
    assert run.stats().grid == tiny.GRID


def test_repr_shows_a_few_readable_lines() -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, SPARSE, HALF) as run:
        assert "none yet" in repr(run)
        tiny.generate(pipe)
        for shown in (run, run.stats(), run.recipe):
            lines = repr(shown).splitlines()
            assert 3 <= len(lines) <= 5
            assert all("object at 0x" not in line for line in lines)
            assert shown._repr_html_().startswith("<table>")
        assert "12 of 24 attention calls sparse" in repr(run).replace("  ", " ")
        assert "q_clusters=6" in repr(run.stats())
    assert "is restored" in repr(run)


@pytest.mark.parametrize("asked", ["nothing", "exact_dense", "set_attention_backend"])
def test_sparsify_dense_calls_take_the_original_kernel_only_where_it_is_asked_for_or_fastest(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    from svg_models.families import dense
    from svg_models.sparse import engine

    pipe = tiny.pipeline()
    stock = tiny.generate(pipe)
    monkeypatch.setattr(engine, "dense_backend", lambda *tensors: "cuda")
    used = []
    original = dense.dispatch_attention_fn

    def spy(*args: Any, **options: Any) -> Any:
        used.append(1)
        return original(*args, **options)

    monkeypatch.setattr(dense, "dispatch_attention_fn", spy)
    if asked == "set_attention_backend":
        pipe.transformer.set_attention_backend("native")
    with sparsify(pipe, Dense(), exact_dense=asked == "exact_dense"):
        video = tiny.generate(pipe)
    assert bool(used) == (asked != "nothing")
    torch.testing.assert_close(video, stock, rtol=1e-3, atol=1e-4)
