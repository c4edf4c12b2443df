"""Which step, branch and video a forward pass belongs to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from diffusers.hooks.hooks import CacheContext

from svg_attention import SVG2, Dense, Schedule
from svg_models import sparsify
from svg_models.sparse.context import Clock, ContextProbe, place_probe

pytestmark = pytest.mark.usefixtures("one_thread")


class Pipe:
    """A pipeline as far as the clock can see it."""

    def __init__(self, scheduler: Any = None, **attributes: Any) -> None:
        self.scheduler = scheduler
        self.__dict__.update(attributes)


def scheduler(index: int | None, begin: int | None = 0, steps: int = 10) -> SimpleNamespace:
    return SimpleNamespace(step_index=index, begin_index=begin, timesteps=list(range(steps)))


def tick(
    clock: Clock, announced: Any = None, timestep: Any = None, name: str = "transformer"
) -> Any:
    return clock.tick(transformer=name, announced=announced, timestep=timestep)


def test_what_the_pipeline_announces_comes_first() -> None:
    pipe = Pipe(scheduler(7), _num_timesteps=10)
    clock = Clock(pipe)
    moment = tick(clock, CacheContext("uncond", step_index=3, num_inference_steps=40), 500.0)
    assert (moment.step, moment.num_steps, moment.branch) == (3, 40, "uncond")
    assert (moment.source, moment.new_video) == ("cache_context", True)


def test_a_context_with_a_name_alone_leaves_the_step_to_the_scheduler() -> None:
    pipe = Pipe(scheduler(None), _num_timesteps=10)
    clock = Clock(pipe)
    steps = []
    for index in (None, 1, 2, 3):
        pipe.scheduler.step_index = index
        for branch in ("cond", "uncond"):
            moment = tick(clock, CacheContext(branch))
            steps.append((moment.step, moment.branch, moment.source))
    assert steps == [(s, b, "scheduler") for s in range(4) for b in ("cond", "uncond")]


@pytest.mark.parametrize("begin", [6, None])
def test_video_to_video_counts_from_where_it_enters_the_schedule(begin: int | None) -> None:
    pipe = Pipe(scheduler(None, begin=begin), _num_timesteps=4)
    clock = Clock(pipe)
    seen = []
    for index in (None, 7, 8, 9):
        pipe.scheduler.step_index = index
        seen.append(tick(clock).step)
    assert seen == [0, 1, 2, 3]
    assert tick(clock).num_steps == 4


def test_without_scheduler_index_changes_of_the_pipelines_timestep_count() -> None:
    pipe = Pipe(SimpleNamespace(timesteps=[0] * 3), _current_timestep=None)
    clock = Clock(pipe)
    seen = []
    for value in (999, 999, 600, 600, 2, 2):
        pipe._current_timestep = torch.tensor(value)
        moment = tick(clock, timestep=torch.tensor([1.0]))
        seen.append((moment.step, moment.branch))
    assert moment.source == "pipeline timestep"
    assert seen == [(s, f"call {n}") for s in range(3) for n in range(2)]


@pytest.mark.parametrize("steps", [5, 36, 50])
def test_the_timestep_argument_is_the_last_resort(steps: int) -> None:
    pipe = Pipe(SimpleNamespace(timesteps=[0] * steps))
    clock = Clock(pipe)
    values = torch.linspace(1000, 20, steps)
    first_frame_clean = torch.zeros(steps, 8)
    first_frame_clean[:, 4:] = values[:, None]
    moments = [tick(clock, timestep=row[None]) for row in first_frame_clean]
    assert [m.step for m in moments] == list(range(steps))
    assert {m.source for m in moments} == {"timestep"}


def test_equal_neighbouring_timesteps_in_bf16_do_not_matter_to_the_scheduler() -> None:
    values = torch.linspace(1000, 960, 20).bfloat16()
    assert values.unique().numel() < 20
    pipe = Pipe(scheduler(None, steps=20))
    clock = Clock(pipe)
    seen = []
    for index, value in enumerate(values):
        pipe.scheduler.step_index = index or None
        seen.append(tick(clock, timestep=value).step)
    assert seen == list(range(20))


def test_nothing_to_go_by_is_said_to_be_unknown() -> None:
    moment = tick(Clock(None), timestep=torch.tensor([3.0]))
    assert (moment.step, moment.num_steps, moment.source) == (None, None, "unknown")


def test_a_step_that_goes_back_opens_a_new_video() -> None:
    clock = Clock(None)
    news = []
    for step in (0, 0, 1, 5, 5, 0, 1):  # caches skip steps, so gaps are fine
        context = CacheContext("cond", step_index=step, num_inference_steps=6)
        news.append(tick(clock, context).new_video)
    assert news == [True, False, False, False, False, True, False]


def test_the_end_of_a_generation_opens_a_new_video_even_at_the_same_step() -> None:
    clock = Clock(None)
    context = CacheContext("cond", step_index=0, num_inference_steps=1)
    assert tick(clock, context).new_video
    assert not tick(clock, context).new_video
    clock.finish()
    assert tick(clock, context).new_video


def test_a_generation_interrupted_in_its_first_step_is_followed_by_a_new_video() -> None:
    pipe = Pipe(scheduler(None))
    clock = Clock(pipe)
    assert [tick(clock).new_video, tick(clock).new_video] == [True, False]
    pipe.scheduler.timesteps = list(pipe.scheduler.timesteps)
    moment = tick(clock)
    assert (moment.new_video, moment.branch) == (True, "call 0")


def test_two_transformers_share_the_step_and_count_their_own_branches() -> None:
    pipe = Pipe(scheduler(None))
    clock = Clock(pipe)
    seen = []
    for index, name in ((None, "a"), (1, "a"), (2, "b"), (3, "b")):
        pipe.scheduler.step_index = index
        seen += [(tick(clock, name=name).step, name) for _ in range(2)]
    assert seen == [(0, "a")] * 2 + [(1, "a")] * 2 + [(2, "b")] * 2 + [(3, "b")] * 2


def test_probe_hears_contexts_and_the_end_of_a_generation() -> None:
    model = tiny.transformer()
    ended = []
    probe = ContextProbe(lambda: ended.append(True))
    undo = place_probe(model, probe, "test")
    with model.cache_context("cond", step_index=2, num_inference_steps=8):
        assert probe.announced.step_index == 2
    assert probe.announced is None
    model._reset_stateful_cache()
    assert ended == [True]
    undo()
    with model.cache_context("cond", step_index=3):
        assert probe.announced is None


def test_probe_still_hears_after_a_cache_was_enabled_and_disabled() -> None:
    from diffusers import FirstBlockCacheConfig

    model = tiny.transformer()
    probe = ContextProbe()
    undo = place_probe(model, probe, "test")
    for change in (lambda: model.enable_cache(FirstBlockCacheConfig()), model.disable_cache):
        change()
        with model.cache_context("cond", step_index=4):
            assert probe.announced.step_index == 4
    undo()


def sources(pipe: Any, **changes: Any) -> list[tuple[int | None, str, int | None]]:
    """Generate and return step, branch and number of steps of each forward pass."""
    seen = []
    with sparsify(pipe, Dense(), Schedule()) as run:
        begin = run._engine.begin_forward

        def note(name: str, context: Any) -> None:
            seen.append((context.moment.step, context.moment.branch, context.moment.num_steps))
            begin(name, context)

        run._engine.begin_forward = note
        tiny.generate(pipe, **changes)
    return seen


def test_a_wan_pipeline_is_read_exactly() -> None:
    expected = [(step, branch, 6) for step in range(6) for branch in ("cond", "uncond")]
    assert sources(tiny.pipeline(), num_inference_steps=6) == expected


def test_a_wan_pipeline_without_guidance_has_one_branch() -> None:
    seen = sources(tiny.pipeline(), num_inference_steps=3, guidance_scale=1.0)
    assert seen == [(step, "cond", 3) for step in range(3)]


def test_guidance_as_one_batch_has_one_branch_and_two_samples() -> None:
    model = tiny.transformer()
    method = SVG2(q_clusters=4, k_clusters=8, top_p=0.5, first_iterations=4)
    with torch.no_grad(), sparsify(model, method, Schedule(dense_steps=0, dense_layers=0)) as run:
        for step in range(2):
            with model.cache_context("cond_uncond", step_index=step, num_inference_steps=2):
                (out,) = model(**tiny.forward_inputs(batch=2))
        records = run.stats().records
    assert out.shape[0] == 2
    assert torch.isfinite(out).all()
    assert {record.branch for record in records} == {"cond_uncond"}
    assert [record.step for record in records] == [0] * 3 + [1] * 3
