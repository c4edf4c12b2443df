"""Timing a denoising loop leaves the pipeline as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from diffusers import FlowMatchHeunDiscreteScheduler

from svg_models.generation.timer import StepTimer

pytestmark = pytest.mark.usefixtures("one_thread")


def timer(pipe: Any, steps: int = 3, progress: Any = lambda *_: None) -> StepTimer:
    loaded: Any = SimpleNamespace(pipe=pipe, device="cpu")
    return StepTimer(loaded, steps, progress, exact=True)


def hooks(pipe: Any) -> int:
    return len(pipe.transformer._forward_pre_hooks)


def test_step_timer_counts_steps_and_leaves_no_trace() -> None:
    pipe = tiny.pipeline()
    with timer(pipe) as stopwatch:
        tiny.generate(pipe, num_inference_steps=3)
    assert len(stopwatch.step_seconds) == 3
    assert stopwatch.seconds == pytest.approx(sum(stopwatch.step_seconds))
    assert "step" not in vars(pipe.scheduler)
    assert hooks(pipe) == 0


def test_step_timer_counts_the_steps_of_a_scheduler_of_second_order() -> None:
    pipe, seen = tiny.pipeline(), []
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    with timer(pipe, 4, lambda stage, done, total: seen.append((stage, done))) as stopwatch:
        tiny.generate(pipe, num_inference_steps=4)
    assert len(stopwatch.step_seconds) == 4
    assert [done for stage, done in seen if stage == "sampling"] == [0, 1, 2, 3, 4]
    assert seen[-1] == ("decoding", 0)


def test_step_timer_puts_back_the_step_that_somebody_else_put_there() -> None:
    pipe, calls = tiny.pipeline(), []
    plain = pipe.scheduler.step

    def own(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return plain(*arguments, **options)

    pipe.scheduler.step = own
    with timer(pipe):
        tiny.generate(pipe, num_inference_steps=3)
    assert vars(pipe.scheduler)["step"] is own
    assert len(calls) == 3


def test_step_timer_leaves_a_step_that_was_put_there_meanwhile() -> None:
    pipe = tiny.pipeline()
    with timer(pipe):
        pipe.scheduler.step = later = lambda *_, **__: None
    assert vars(pipe.scheduler)["step"] is later


def test_step_timer_interrupted_while_it_is_set_up_leaves_no_trace() -> None:
    pipe = tiny.pipeline()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), timer(pipe, progress=interrupted):
        pass
    assert "step" not in vars(pipe.scheduler)
    assert hooks(pipe) == 0
