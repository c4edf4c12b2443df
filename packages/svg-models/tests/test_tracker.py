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
from svg_models.sparse.caller import pipelines_running
from svg_models.sparse.probe import ContextProbe, place_probe
from svg_models.sparse.tracker import StepTracker

pytestmark = pytest.mark.usefixtures("one_thread")


class Pipe:
    """A pipeline as far as the tracker can see it."""

    def __init__(self, scheduler: Any = None, **attributes: Any) -> None:
        self.scheduler = scheduler
        self.__dict__.update(attributes)


def scheduler(index: int | None, begin: int | None = 0, steps: int = 10) -> SimpleNamespace:
    return SimpleNamespace(step_index=index, begin_index=begin, timesteps=list(range(steps)))


def tick(
    tracker: StepTracker,
    announced: Any = None,
    timestep: Any = None,
    name: str = "transformer",
    **more: Any,
) -> Any:
    return tracker.tick(transformer=name, announced=announced, timestep=timestep, **more)


def test_tick_believes_first_what_the_pipeline_announces() -> None:
    pipe = Pipe(scheduler(7), _num_timesteps=10)
    tracker = StepTracker(pipe)
    moment = tick(tracker, CacheContext("uncond", step_index=3, num_inference_steps=40), 500.0)
    assert (moment.step, moment.num_steps, moment.branch) == (3, 40, "uncond")
    assert (moment.source, moment.new_video) == ("cache_context", True)


def test_tick_leaves_the_step_to_the_scheduler_if_a_context_only_has_a_name() -> None:
    pipe = Pipe(scheduler(None), _num_timesteps=10)
    tracker = StepTracker(pipe)
    steps = []
    for index in (None, 1, 2, 3):
        pipe.scheduler.step_index = index
        for branch in ("cond", "uncond"):
            moment = tick(tracker, CacheContext(branch))
            steps.append((moment.step, moment.branch, moment.source))
    assert steps == [(s, b, "scheduler") for s in range(4) for b in ("cond", "uncond")]


@pytest.mark.parametrize("begin", [6, None])
def test_tick_counts_from_where_video_to_video_enters_the_schedule(begin: int | None) -> None:
    pipe = Pipe(scheduler(None, begin=begin), _num_timesteps=4)
    tracker = StepTracker(pipe)
    seen = []
    for index in (None, 7, 8, 9):
        pipe.scheduler.step_index = index
        seen.append(tick(tracker).step)
    assert seen == [0, 1, 2, 3]
    assert tick(tracker).num_steps == 4


def test_tick_counts_changes_of_the_pipelines_timestep_without_a_table() -> None:
    pipe = Pipe(SimpleNamespace(timesteps=[0] * 3), _current_timestep=None)
    tracker = StepTracker(pipe)
    seen = []
    for value in (999, 999, 600, 600, 2, 2):
        pipe._current_timestep = torch.tensor(value)
        moment = tick(tracker, timestep=torch.tensor([1.0]))
        seen.append((moment.step, moment.branch))
    assert moment.source == "pipeline timestep"
    assert seen == [(s, f"call {n}") for s in range(3) for n in range(2)]


@pytest.mark.parametrize("steps", [5, 36, 50])
def test_tick_takes_the_timestep_argument_last(steps: int) -> None:
    pipe = Pipe(SimpleNamespace(timesteps=[0] * steps))
    tracker = StepTracker(pipe)
    values = torch.linspace(1000, 20, steps)
    first_frame_clean = torch.zeros(steps, 8)
    first_frame_clean[:, 4:] = values[:, None]
    moments = [tick(tracker, timestep=row[None]) for row in first_frame_clean]
    assert [m.step for m in moments] == list(range(steps))
    assert {m.source for m in moments} == {"timestep"}


def test_tick_is_not_misled_by_equal_neighbouring_timesteps_in_bf16() -> None:
    values = torch.linspace(1000, 960, 20).bfloat16()
    assert values.unique().numel() < 20
    pipe = Pipe(scheduler(None, steps=20))
    tracker = StepTracker(pipe)
    seen = []
    for index, value in enumerate(values):
        pipe.scheduler.step_index = index or None
        seen.append(tick(tracker, timestep=value).step)
    assert seen == list(range(20))


def test_tick_says_unknown_with_nothing_to_go_by() -> None:
    moment = tick(StepTracker(None), timestep=torch.tensor([3.0]))
    assert (moment.step, moment.num_steps, moment.source) == (None, None, "unknown")


def test_tick_opens_a_new_video_when_the_step_goes_back() -> None:
    tracker = StepTracker(None)
    news = []
    for step in (0, 0, 1, 5, 5, 0, 1):  # caches skip steps, so gaps are fine
        context = CacheContext("cond", step_index=step, num_inference_steps=6)
        news.append(tick(tracker, context).new_video)
    assert news == [True, False, False, False, False, True, False]


def test_tick_opens_a_new_video_after_the_end_of_one_even_at_the_same_step() -> None:
    tracker = StepTracker(None)
    context = CacheContext("cond", step_index=0, num_inference_steps=1)
    assert tick(tracker, context).new_video
    assert not tick(tracker, context).new_video
    tracker.finished = True
    assert tick(tracker, context).new_video


def test_tick_opens_a_new_video_after_one_interrupted_in_its_first_step() -> None:
    pipe = Pipe(scheduler(None))
    tracker = StepTracker(pipe)
    assert [tick(tracker).new_video, tick(tracker).new_video] == [True, False]
    pipe.scheduler.timesteps = list(pipe.scheduler.timesteps)
    moment = tick(tracker)
    assert (moment.new_video, moment.branch) == (True, "call 0")


def test_tick_shares_the_step_between_two_transformers() -> None:
    pipe = Pipe(scheduler(None))
    tracker = StepTracker(pipe)
    seen = []
    for index, name in ((None, "a"), (1, "a"), (2, "b"), (3, "b")):
        pipe.scheduler.step_index = index
        seen += [(tick(tracker, name=name).step, name) for _ in range(2)]
    assert seen == [(0, "a")] * 2 + [(1, "a")] * 2 + [(2, "b")] * 2 + [(3, "b")] * 2


def test_tick_maps_two_evaluations_of_a_second_order_scheduler_to_one_step() -> None:
    table = torch.tensor([900.0, 600.0, 600.0, 300.0, 300.0])
    of_heun = SimpleNamespace(step_index=None, begin_index=0, order=2, timesteps=table)
    pipe = Pipe(of_heun, _num_timesteps=5)
    tracker = StepTracker(pipe)
    seen = []
    for evaluation in range(5):
        of_heun.step_index = evaluation or None
        for name in ("cond", "uncond"):
            moment = tick(tracker, CacheContext(name))
            seen.append((moment.step, moment.num_steps, moment.branch, moment.new_video))
    assert [step for step, *_ in seen] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert {(count, branch) for _, count, branch, _ in seen} == {(3, "cond"), (3, "uncond")}
    assert [new for *_, new in seen] == [True] + [False] * 9
    announced = CacheContext("cond", step_index=3, num_inference_steps=5)
    assert (tick(tracker, announced).step, tick(tracker, announced).num_steps) == (1, 3)


def test_tick_finds_the_timestep_in_the_table_of_a_scheduler_without_an_index() -> None:
    pipe = Pipe(SimpleNamespace(timesteps=torch.tensor([999, 749, 499, 249])), _num_timesteps=3)
    tracker = StepTracker(pipe)
    assert [tick(tracker, timestep=torch.tensor([t])).step for t in (749, 249)] == [0, 2]


def test_tick_opens_a_new_video_when_size_or_steps_change() -> None:
    tracker = StepTracker(None)
    for count, grid, new in ((8, (3, 4, 4), True), (8, (3, 4, 4), False), (8, (3, 6, 4), True)):
        context = CacheContext("cond", step_index=3, num_inference_steps=count)
        assert tick(tracker, context, grid=grid).new_video is new
    context = CacheContext("cond", step_index=4, num_inference_steps=9)
    assert tick(tracker, context, grid=(3, 6, 4)).new_video


def test_tick_opens_a_new_video_for_other_latents_at_step_0_of_a_transformer_alone() -> None:
    tracker, context = StepTracker(None), CacheContext("cond", step_index=0, num_inference_steps=1)
    first, second = torch.zeros(1, 4), torch.zeros(1, 4)
    moments = [tick(tracker, context, latents=first) for _ in range(2)]
    assert [(m.new_video, m.branch) for m in moments] == [(True, "cond"), (False, "cond 2")]
    other = CacheContext("uncond", step_index=0, num_inference_steps=1)
    assert not tick(tracker, other, latents=second).new_video
    assert tick(tracker, context, latents=second).new_video
    second.normal_()
    assert tick(tracker, context, latents=second).new_video


def test_tick_believes_a_scheduler_outside_of_its_pipeline_only_with_its_own_timestep() -> None:
    table = torch.tensor([900.0, 600.0, 300.0])
    pipe = Pipe(SimpleNamespace(step_index=1, begin_index=None, timesteps=table))
    tracker = StepTracker(pipe, running=False)
    assert tick(tracker, timestep=torch.tensor([600.0])).step == 1
    moment = tick(tracker, timestep=torch.tensor([450.0]))
    assert (moment.step, moment.source) == (None, "unknown")
    pipe.scheduler.step_index = 3  # left there by the clip before
    assert tick(tracker, timestep=torch.tensor([900.0])).step is None


def test_pipelines_running_returns_the_innermost_first() -> None:
    model = tiny.transformer()

    class Runner(Pipe):
        def __call__(self, inner: Any = None) -> list[Any]:
            return inner() if inner else pipelines_running(model)

    one = Runner(scheduler(0), transformer=model)
    two = Runner(scheduler(0), transformer=None, transformer_2=torch.nn.DataParallel(model))

    class Blocks:
        """As diffusers' modular pipelines: the parts are handed to the block that loops."""

        def __call__(self, components: Any) -> list[Any]:
            return pipelines_running(model)

    assert Blocks()(one) == [one]
    stranger = Runner(scheduler(0), transformer=tiny.transformer())
    assert pipelines_running(model) == []
    assert one() == [one]
    assert one(lambda: stranger(two)) == [two, one]


def test_place_probe_hears_contexts_and_the_end_of_a_generation() -> None:
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


def test_place_probe_still_hears_after_a_cache_was_enabled_and_disabled() -> None:
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


def test_sparsify_reads_a_wan_pipeline_exactly() -> None:
    expected = [(step, branch, 6) for step in range(6) for branch in ("cond", "uncond")]
    assert sources(tiny.pipeline(), num_inference_steps=6) == expected


def test_sparsify_reads_one_branch_without_guidance() -> None:
    seen = sources(tiny.pipeline(), num_inference_steps=3, guidance_scale=1.0)
    assert seen == [(step, "cond", 3) for step in range(3)]


def test_sparsify_reads_one_branch_of_guidance_in_one_batch() -> None:
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
