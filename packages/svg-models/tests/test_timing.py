"""Speeds are claimed only where they are right: clocks are given, machines slow down at will."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tiny

from svg_attention import CallRecord
from svg_models.comparison.gain import Cost, first_gain
from svg_models.comparison.machine import CoreTimes, others_at_work
from svg_models.comparison.timing import judge
from svg_models.generation.clip import Clip
from svg_models.generation.sample import sample
from svg_models.generation.settings import Settings
from svg_models.loading import load_pipeline
from svg_models.method_names import MethodSpec
from svg_models.sparse.pairs import PairedStep
from svg_models.sparse.run import sparsify
from svg_models.stats import RunStats

STEPS, DENSE_STEPS = 20, 4
OUTSIDE, DENSE_ATTENTION = 1.0, 0.4  # seconds of a step on a machine with nothing else to do
TRUTH = {"svg2@0.25": (0.9, 0.15), "svg1@0.25": (0.2, 0.2), "random@0.25": (0.45, 0.45)}

Slowness = Callable[[float], float]


class Machine:
    """A clock that runs ahead by the work done, times how slow the machine is at that moment."""

    def __init__(self, slowness: Slowness) -> None:
        self.time, self._slowness = 0.0, slowness

    def work(self, seconds: float) -> float:
        """Return how long so much work took."""
        took = 0.0
        for _ in range(20):
            took += (part := seconds / 20 * self._slowness(self.time + took))
            assert part > 0
        self.time += took
        return took


def clips(slowness: Slowness) -> list[Clip]:
    """Return the clips of every method as this machine would time them, one after the other."""
    machine = Machine(slowness)
    return [clip(machine, name, *costs) for name, costs in TRUTH.items()]


def clip(machine: Machine, name: str, first: float, later: float) -> Clip:
    paired = []
    timed = {DENSE_STEPS, 9, 14, 19}
    for step in range(STEPS):
        if step < DENSE_STEPS:
            machine.work(OUTSIDE + DENSE_ATTENTION)
            continue
        attention = machine.work(first if step == DENSE_STEPS else later)
        outside = machine.work(OUTSIDE)
        if step in timed:
            dense_attention = machine.work(DENSE_ATTENTION)
            dense = machine.work(OUTSIDE) + dense_attention
            paired.append(
                PairedStep(
                    step=step,
                    first=step == DENSE_STEPS,
                    seconds=attention + outside,
                    attention=attention,
                    dense_seconds=dense,
                    dense_attention=dense_attention,
                )
            )
    return made(name, paired)


def made(name: str, paired: Sequence[PairedStep]) -> Clip:
    records = tuple(
        CallRecord(
            step=step,
            layer=0,
            branch="cond",
            transformer="transformer",
            method="Dense" if step < DENSE_STEPS else "SVG2",
            density=1.0,
            seconds=0.1,
            tokens=432,
        )
        for step in range(STEPS)
    )
    return Clip(
        frames=np.zeros((1, 8, 8, 3), np.uint8),
        settings=Settings(prompt="a circle"),
        method=MethodSpec.parse(name),
        model="embedded",
        loras=(),
        seconds=1.0,
        step_seconds=(1.0,) * STEPS,
        decode_seconds=0.1,
        stats=RunStats(records=records, recipe={}),
        paired_steps=tuple(paired),
    )


def truth(name: str) -> float:
    first, later = TRUTH[name]
    dense = OUTSIDE + DENSE_ATTENTION
    sparse = STEPS - DENSE_STEPS
    took = DENSE_STEPS * dense + (OUTSIDE + first) + (sparse - 1) * (OUTSIDE + later)
    return STEPS * dense / took


def speeds(timing: Any) -> list[float | None]:
    return [None if speed is None else speed.speedup for speed in timing.speeds]


def test_judge_gives_the_speed_of_the_whole_loop_on_a_quiet_machine() -> None:
    timing = judge(clips(lambda t: 1.0))
    assert timing.reason == ""
    assert speeds(timing) == pytest.approx([truth(name) for name in TRUTH])
    svg2 = timing.speeds[0]
    assert svg2 is not None
    assert (svg2.dense_step, svg2.dense_attention) == pytest.approx((1.4, 0.4))
    assert (svg2.step, svg2.attention) == pytest.approx((1.15, 0.15))
    assert svg2.bound == pytest.approx(20 * 1.4 / (4 * 1.4 + 16 * 1.0))


def test_judge_a_machine_that_was_slow_for_one_clip_alone_has_no_speeds() -> None:
    timing = judge(clips(lambda t: 1.0 if t < 24.0 else 2.5))  # the first clip is then nearly done
    assert speeds(timing) == [None, None, None]
    assert "the same work" in timing.reason


def test_judge_a_machine_slowed_for_good_still_has_the_right_speeds() -> None:
    assert speeds(judge(clips(lambda t: 3.0))) == pytest.approx([truth(name) for name in TRUTH])


@pytest.mark.parametrize("seed", range(60))
def test_judge_claims_nothing_wrong_under_any_load(seed: int) -> None:
    draw = random.Random(seed)
    edges = sorted(draw.uniform(0, 120) for _ in range(draw.randint(1, 12)))
    levels = [draw.choice([1.0, 1.1, 1.5, 2.0, 4.0]) for _ in range(len(edges) + 1)]

    def slowness(now: float) -> float:
        return levels[sum(edge <= now for edge in edges)]

    for found, name in zip(speeds(judge(clips(slowness))), TRUTH, strict=True):
        assert found is None or found == pytest.approx(truth(name), rel=0.08)


def paired(**changes: float) -> PairedStep:
    usual = {"seconds": 1.2, "attention": 0.2, "dense_seconds": 1.4, "dense_attention": 0.4}
    return PairedStep(step=5, first=False, **(usual | changes))  # type: ignore[arg-type]


def test_judge_time_outside_attention_must_agree() -> None:
    disturbed = made("svg2@0.25", [paired(seconds=1.7)] * 3)
    fine = made("svg1@0.25", [paired()] * 3)
    timing = judge([disturbed, fine])
    assert speeds(timing) == [None, None]
    assert timing.reason.startswith("time outside attention, the same work for all, was 1 s a step")
    assert "1.5 s with SVG2 @ 25%" in timing.reason
    faster = made("svg2@0.35", [paired(seconds=0.8)] * 3)
    assert judge([faster]).speeds == (None,)
    recipe = {"linears": "fp8"}
    fp8 = dataclasses.replace(faster, stats=dataclasses.replace(faster.stats, recipe=recipe))
    (speed,) = judge([fp8]).speeds
    assert speed is not None, "products in fp8 are faster"
    assert (speed.later, speed.bound) == (pytest.approx(1.4 / 0.8), None)


def test_judge_no_speed_goes_beyond_the_share_of_attention() -> None:
    too_good = made("svg2@0.25", [paired(seconds=0.9, attention=0.0)] * 3)
    timing = judge([too_good])
    assert timing.speeds == (None,)
    assert "at most 1.30x" in timing.reason


def test_judge_other_work_and_dense_methods_have_no_speed() -> None:
    busy = "other programs kept 1.9 of 2 cores busy"
    timing = judge(clips(lambda t: 1.0), others=busy)
    assert speeds(timing) == [None] * 3
    assert timing.reason.endswith(busy)
    never_sparse = made("svg2@0.25", [])
    assert judge([never_sparse]).reason == "no step of any method was sparse"
    assert speeds(judge([never_sparse, made("svg1@0.3", [paired()] * 3)]))[0] is None


@pytest.mark.parametrize(
    ("cores", "threads", "others", "told"),
    [(2, 2, 0.1, ""), (2, 2, 2.0, "2.0 of 2 cores"), (16, 8, 7.0, ""), (16, 8, 10.0, "10.0 of 16")],
)
def test_others_at_work_counts_only_what_was_missing(
    cores: int, threads: int, others: float, told: str
) -> None:
    before = CoreTimes(wall=5.0, busy=100.0, own=3.0, cores=cores)
    after = CoreTimes(wall=15.0, busy=100.0 + 10 * (others + 1.5), own=18.0, cores=cores)
    said = others_at_work(before, after, threads=threads)
    assert (told in said) if told else said == ""
    unknown = dataclasses.replace(after, busy=None)
    assert others_at_work(before, unknown, threads=threads) == ""


def test_core_times_count_our_own_work() -> None:
    before = CoreTimes.now()
    while CoreTimes.now().own < before.own + 0.1:
        sum(range(10_000))
    after = CoreTimes.now()
    assert after.wall >= before.wall + 0.05
    assert after.busy is None or after.busy >= (before.busy or 0.0)


def test_first_gain_is_where_the_saved_attention_outweighs_the_planning() -> None:
    dense, sparse = Cost(square=4e-9, linear=0.0), Cost(square=1e-9, linear=3e-5)
    tokens, speedup = first_gain(1000, outside=0.1, calls=10, dense=dense, sparse=sparse) or (0, 0)
    assert speedup == pytest.approx(1.1, abs=0.02)
    rest = 0.1 * tokens / 1000
    assert (rest + 10 * dense(tokens)) / (rest + 10 * sparse(tokens)) == pytest.approx(
        speedup, abs=1e-3
    )
    assert first_gain(1000, outside=0.1, calls=10, dense=dense, sparse=dense) is None


def test_cost_goes_through_both_calls() -> None:
    cost = Cost.through((1000, 0.5), (4000, 5.0))
    assert (cost(1000), cost(4000)) == pytest.approx((0.5, 5.0))
    assert Cost.through((1000, 1.0), (2000, 1.5)).square == 0.0


def test_beside_dense_times_chosen_steps_and_changes_nothing(one_thread: None, tmp_path) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "tiny")
    loaded = load_pipeline(tmp_path / "tiny", device="cpu")
    settings = Settings(
        prompt="a red circle", steps=8, guidance=2.0, height=48, width=48, frames=9, fps=8
    )
    spec = MethodSpec.parse("svg2@0.4")
    alone = sample(loaded, settings, spec, profile=True)
    paired = sample(loaded, settings, spec, profile=True, beside_dense=True)
    assert (alone.frames == paired.frames).all()
    assert alone.paired_steps == ()
    assert [(r.method, r.density) for r in alone.stats.records] == [
        (r.method, r.density) for r in paired.stats.records
    ]
    first = next(r.step for r in paired.stats.sparse_records)
    assert [s.step for s in paired.paired_steps] == [first, first + 1, 4, 7]
    assert [s.first for s in paired.paired_steps] == [True, False, False, False]
    for step in paired.paired_steps:
        assert step.seconds > step.attention > 0
        assert step.dense_seconds > step.dense_attention > 0
    assert not loaded.pipe.transformer._forward_hooks
    assert alone.recall is None
    assert paired.recall is not None
    assert paired.stats.mean_density + 0.05 < paired.recall < 1.0, "more than chance would keep"
    assert paired.total_seconds >= paired.seconds + paired.decode_seconds
    assert paired.peak_memory is None or paired.peak_memory > 1 << 20


def test_dense_pairs_reads_the_clock_that_it_is_given(one_thread: None) -> None:
    pipe, reads, left_out = tiny.pipeline(), [0.0], []

    def now() -> float:
        reads[0] += 1.0
        return reads[0]

    with (
        sparsify(pipe, "svg2@0.4", profile=True) as run,
        run.beside_dense(now=now, leave_out=left_out.append) as pairs,
    ):
        tiny.generate(pipe, num_inference_steps=6)
        steps = pairs.steps()
        assert {r.method for r in run.stats().records if r.step in {s.step for s in steps}} == {
            "SVG2"
        }
    assert set(left_out) == {1.0}, "dense passes, and recalls"
    assert [(s.seconds, s.dense_seconds) for s in steps] == [(2.0, 2.0)] * 4, "two branches"
