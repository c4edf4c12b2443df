"""Tuning: the search finds what is best, and nothing that was measured is lost."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from tuned import made_up
from typer.testing import CliRunner

from svg_attention import SVG2, Schedule
from svg_models import sparsify, tune
from svg_models.cli import app
from svg_models.errors import SettingError
from svg_models.loading import LoadedPipeline, load_pipeline
from svg_models.recipe import Layers, Recipe
from svg_models.tuning import run as tuning_run
from svg_models.tuning.journal import Journal, Trial, key_of
from svg_models.tuning.page import tune_page
from svg_models.tuning.request import TuneRequest
from svg_models.tuning.search import Outcome, OutOfTime, Search, Target, _sensible, most_trials
from svg_models.tuning.space import (
    ALIKE,
    AXES,
    CORRECTIONS,
    SCHEDULES,
    START,
    Point,
    axes_for,
    rounded,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# --- the search, on a made-up model ---------------------------------------------------------------

LIFT = dict(zip(CORRECTIONS, (-6.0, 0.0, 1.0, 3.0, 4.0, 7.5, 6.0), strict=True))
DENSE = {"dense for 10 %": 0.1, "dense for 20 %": 0.2, "dense for 30 %": 0.3}
READ_ALIKE = dict(zip(ALIKE, (0.0, 1.0, -0.5, 0.2), strict=True))
# What a cache spares, and what it costs in dB.
CACHES = dict(
    zip(AXES["cache"], ((1.0, 0.0), (0.9, 0.2), (0.7, 3.0), (0.5, 9.0), (0.6, 14.0)), strict=True)
)
SUITS = dict(zip(SCHEDULES, (2.0, 0.5, 0.0, 0.5, 0.0, -1.0), strict=True))


class Model:
    """Quality and cost as formulas: 5 dB for twice the density, and what each choice adds."""

    def __init__(self, prompts: int = 3, limit: int = 10_000) -> None:
        self.asked: list[tuple[Point, int]] = []
        self._spread = [1.5 * (-1) ** i for i in range(prompts)]
        self._limit = limit

    def outcome(self, point: Point, count: int) -> Outcome:
        quality = 40 + 5 * math.log2(point.density) + LIFT[point.corrections]
        quality += SUITS[point.schedule] + (0.3 if point.metric == "response" else 0.0)
        quality -= 0.5 if point.probe_rows == 32 else 0.0
        quality += READ_ALIKE[point.alike] + (0.2 if point.spend == "call" else 0.0)
        spared, lost = CACHES[point.cache]
        quality -= lost
        quality += sum(self._spread[:count]) / count
        dense = DENSE.get(point.schedule, 0.0)
        probes = 0.5 / point.probe_rows if point.routed else 0.0
        cost = spared * (dense + (1 - dense) * (point.density + probes))
        return Outcome(psnr=quality, cost=cost)

    def __call__(self, point: Point, count: int) -> Outcome:
        if (point, count) not in self.asked:
            if len(self.asked) >= self._limit:
                raise OutOfTime
            self.asked.append((point, count))
        return self.outcome(point, count)


@functools.cache
def everything() -> list[Point]:
    densities = sorted({rounded(0.01 * i) for i in range(2, 96, 3)})
    names = list(AXES)
    points = (
        Point(density=d, **dict(zip(names, values, strict=True)))
        for d in densities
        for values in itertools.product(*AXES.values())
    )
    return [point for point in points if _sensible(point)]


@pytest.mark.parametrize("psnr", [24.0, 30.0, 36.0, 41.0])
def test_search_finds_the_least_cost_that_reaches_a_quality(psnr: float) -> None:
    model = Model()
    found = Search(Target(psnr=psnr), model, prompts=3).run()
    assert found is not None
    got = model.outcome(found, 3)
    best = min(
        (o for o in (model.outcome(p, 3) for p in everything()) if o.psnr >= psnr),
        key=lambda o: o.cost,
    )
    assert got.psnr >= psnr
    assert got.cost <= 1.15 * best.cost
    assert (found.corrections, found.schedule) == ("error+bias+residual", "flat")
    assert sum(1 for _ in model.asked) <= most_trials(3)


@pytest.mark.parametrize("cost", [0.1, 0.2, 0.4, 0.7])
def test_search_finds_the_best_quality_within_a_cost(cost: float) -> None:
    model = Model()
    found = Search(Target(cost=cost), model, prompts=3).run()
    assert found is not None
    got = model.outcome(found, 3)
    best = max(
        (o for o in (model.outcome(p, 3) for p in everything()) if o.cost <= cost),
        key=lambda o: o.psnr,
    )
    assert got.cost <= cost
    assert got.psnr >= best.psnr - 1.0


def test_search_is_the_same_every_time_and_asks_only_for_what_it_needs() -> None:
    first, second = Model(), Model()
    for model in (first, second):
        Search(Target(psnr=33.0), model, prompts=3).run()
    assert first.asked == second.asked
    on_all = {point for point, count in first.asked if count == 3}
    on_one = {point for point, count in first.asked if count == 1}
    assert len(on_all) <= 6 < len(on_one)


def test_search_that_runs_out_of_time_returns_the_best_so_far() -> None:
    whole = Model()
    Search(Target(psnr=30.0), whole, prompts=3).run()
    for limit in (0, 1, 3, 10, len(whole.asked) - 1):
        model = Model(limit=limit)
        search = Search(Target(psnr=30.0), model, prompts=3)
        found = search.run()
        kept = [(p, c) for p, c in model.asked if model.outcome(p, c).psnr >= 30.0]
        if found is None:
            assert not kept
        else:
            assert found in {point for point, _ in kept}
        assert (search.closest() is None) == (limit == 0)


def test_search_for_what_cannot_be_reached_says_how_near_it_came() -> None:
    model = Model()
    search = Search(Target(psnr=80.0), model, prompts=2)
    assert search.run() is None
    closest = search.closest()
    assert closest is not None
    point, outcome = closest
    assert point.density == 0.95
    assert outcome.psnr < 80.0


def test_search_what_held_on_one_prompt_must_hold_on_all() -> None:
    # The first prompt is easier by 1.5 dB than the mean of two.
    model = Model(prompts=2)
    found = Search(Target(psnr=30.0), model, prompts=2).run()
    assert found is not None
    assert model.outcome(found, 2).psnr >= 30.0


# --- the space ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("corrections", CORRECTIONS)
def test_recipe_of_every_point_is_one_that_a_file_holds(
    corrections: str, schedule: str, tmp_path: Path
) -> None:
    for density in (0.02, 0.3, 0.95):
        point = Point(density=density, corrections=corrections, schedule=schedule)
        recipe = point.recipe(Layers())
        assert Recipe.read(recipe.save(tmp_path / "one.json")) == recipe
        assert isinstance(recipe.method, SVG2)
        assert recipe.method.density == density


def test_recipe_schedules_do_what_their_names_say() -> None:
    def densities(name: str, density: float) -> list[float]:
        schedule = Point(density=density, corrections="error", schedule=name).recipe(Layers())
        found = []
        for step in range(10):
            where = {"step": step, "num_steps": 10}
            if schedule.schedule.is_dense(**where, layer=0, num_layers=4):
                found.append(1.0)
            else:
                at = schedule.schedule.density_at(**where)
                found.append(density if at is None else round(at, 3))
        return found

    assert densities("flat", 0.2) == [0.2] * 10
    assert densities("dense for 30 %", 0.2) == [1.0] * 3 + [0.2] * 7
    assert densities("start at 60 %", 0.2) == [0.6] * 3 + [0.2] * 7
    falling = densities("falling", 0.2)
    assert falling[0] == 0.4
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.14


def test_axes_leave_out_schedules_that_come_to_the_same() -> None:
    assert axes_for(20)["schedule"] == tuple(SCHEDULES)
    few = ("flat", "falling", "start at 60 %")
    assert axes_for(3)["schedule"] == few
    assert axes_for(4)["schedule"] == (*few, "dense for 30 %")
    assert axes_for(8)["schedule"] == (*few, "dense for 20 %", "dense for 30 %")
    for steps in range(1, 60):
        assert START.schedule in axes_for(steps)["schedule"]


# --- the journal ----------------------------------------------------------------------------------

TRIAL = Trial(point=START, prompt=0, psnr=31.5, ssim=0.9, flip=0.1, flicker=0.5, work=0.3)


def test_journal_keeps_every_trial_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.journal.json"
    journal = Journal(path)
    others = [dataclasses.replace(TRIAL, prompt=i, psnr=None if i else 3.0) for i in range(5)]
    for number, trial in enumerate(others):
        journal.add(str(number), trial)
        again = Journal(path)
        assert [again.get(str(i)) for i in range(number + 1)] == others[: number + 1]
    assert list(path.parent.iterdir()) == [path]


def test_key_tells_trials_of_other_conditions_apart() -> None:
    base: dict[str, Any] = {"model": "a", "settings": {"seed": 3, "prompt": "x"}}
    keys = {
        key_of(base, START),
        key_of(base, START.replace(density=0.3)),
        key_of(base, None),
        key_of(base | {"model": "b"}, START),
        key_of(base | {"settings": {"seed": 4, "prompt": "x"}}, START),
    }
    assert len(keys) == 5
    assert key_of(dict(reversed(base.items())), START) == key_of(base, START)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": "svg-tune/2", "trials": {}}',
        '{"format": "svg-tune/1", "trials": {"a": 3}}',
        '{"format": "svg-tune/1", "trials": {"a": {"point": {"density": 1}}}}',
        json.dumps({"format": "svg-tune/1", "trials": {"a": TRIAL.to_dict() | {"work": "1"}}}),
        json.dumps(
            {
                "format": "svg-tune/1",
                "trials": {"a": TRIAL.to_dict() | {"point": START.to_dict() | {"metric": "x"}}},
            }
        ),
        "[" * 100_000,
    ],
)
def test_journal_refuses_what_is_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.journal.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SettingError, match="as the journal of a search"):
        Journal(path)


def test_axes_have_caches_where_there_are_steps_to_spare() -> None:
    assert axes_for(20)["cache"] == AXES["cache"]
    assert axes_for(20, guided=False)["alike"] == ("nothing", "two steps")
    assert axes_for(8)["cache"] == axes_for(20, cached=False)["cache"] == ("none",)


def test_cost_is_claimed_from_times_or_else_from_counted_work() -> None:
    assert TRIAL.cost == 0.3
    assert dataclasses.replace(TRIAL, share=0.5).cost == pytest.approx(1 - 0.5 * 0.7)
    timed = dataclasses.replace(TRIAL, share=0.5, seconds=2.0, dense_seconds=5.0)
    assert timed.cost == 0.4
    # Of half of the blocks, half of the time is attention, of which less than half is computed.
    cached = dataclasses.replace(TRIAL, share=0.5, computed=0.5, work=0.2)
    assert cached.cost == pytest.approx(0.5 * 0.5 + 0.5 * 0.2)


# --- on a model -----------------------------------------------------------------------------------

FEW_AXES = {
    "corrections": ("compensation", "error+bias+repair"),
    "schedule": ("flat", "dense for 30 %"),
    "metric": ("euclidean", "response"),
}
CLIP: dict[str, Any] = {"steps": 4, "guidance": 2.0, "height": 48, "width": 48, "frames": 9}
PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(autouse=True, scope="module")
def few_axes() -> Iterator[None]:
    """Search less: on a model, what counts here is what happens to each trial."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuning_run, "axes_for", lambda steps, cached, guided: FEW_AXES)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.pipeline().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def loaded(folder: str) -> LoadedPipeline:
    return load_pipeline(folder, device="cpu")


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal") / "tiny.journal.json"


@pytest.fixture(scope="module")
def tuned(loaded: LoadedPipeline, journal: Path) -> Any:
    return tune(psnr=30, model=loaded, prompts=PROMPTS, time_by="density", journal=journal, **CLIP)


def test_tune_returns_a_recipe_that_keeps_the_budget_when_it_is_run(
    tuned: Any, loaded: LoadedPipeline
) -> None:
    (one,) = tuned.recipe.measured
    assert one.psnr >= 30
    assert (one.prompts, one.steps, one.tokens) == (2, 4, 432)
    assert 0 < one.work < 1
    assert one.seconds is None, "nothing was timed"
    assert one.noise_floor is None or one.noise_floor > one.psnr
    assert one.versions["svg-models"]
    # The clip of the recipe is the one that was measured.
    from svg_models import generate
    from svg_models.video import similarity

    psnr = []
    for seed, prompt in enumerate(PROMPTS):
        clips = [
            generate(prompt, model=loaded, seed=seed, **CLIP, **how)
            for how in ({"recipe": tuned.recipe}, {"method": "dense"})
        ]
        psnr.append(similarity(clips[0].frames, clips[1].frames).mean_psnr)
    assert sum(psnr) / 2 == pytest.approx(one.psnr, abs=1e-3)


def test_tune_measures_nothing_twice_and_another_budget_starts_from_what_is_known(
    tuned: Any, loaded: LoadedPipeline, journal: Path
) -> None:
    before = journal.read_bytes()
    said: list[str] = []
    how = dict(model=loaded, prompts=PROMPTS, time_by="density", journal=journal, **CLIP)
    again = tune(psnr=30, tell=said.append, **how)
    assert said == []
    assert journal.read_bytes() == before
    assert again.recipe == tuned.recipe
    assert again.trials == tuned.trials
    other = tune(psnr=46, tell=said.append, **how)
    assert 0 < len(said) < len(tuned.trials)
    assert other.recipe.measured[0].work >= tuned.recipe.measured[0].work


def test_tune_that_is_interrupted_goes_on_and_ends_the_same(
    tuned: Any, loaded: LoadedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = dict(model=loaded, prompts=PROMPTS, time_by="density", journal=tmp_path / "j", **CLIP)
    stops = iter([5, 9])
    calls = itertools.count()
    real = tuning_run.sample
    stop_at = next(stops)

    def sample(*args: Any, **options: Any) -> Any:
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(tuning_run, "sample", sample)
    with pytest.raises(KeyboardInterrupt):
        tune(psnr=30, **how)
    kept = len(Journal(tmp_path / "j"))
    assert kept == 4, "five clips were made, the first of them dense"
    resumed = tune(psnr=30, **how)
    assert resumed.recipe == tuned.recipe
    assert resumed.trials == tuned.trials


def test_tune_times_in_turns_with_dense(loaded: LoadedPipeline, tmp_path: Path) -> None:
    said: list[str] = []
    found = tune(
        speedup=1.01,
        model=loaded,
        prompts=PROMPTS[:1],
        budget_minutes=0.005,
        tell=said.append,
        **CLIP,
    )
    assert found.trials
    for trial in found.trials:
        assert trial.share is not None
        assert 0 < trial.share < 1
        assert (trial.seconds is None) == bool(trial.doubt)
    assert all("as fast as dense" in line or "not timed: " in line for line in said)


def test_tune_stops_when_its_minutes_are_over(loaded: LoadedPipeline) -> None:
    found = tune(psnr=98 - 10, model=loaded, prompts=PROMPTS, budget_minutes=1e-6, **CLIP)
    assert found.recipe is None
    assert len(found.trials) == 0
    assert "no time for a single trial" in found.shortfall()
    assert "No recipe" in tune_page(found)


def test_page_shows_the_curve_the_recipe_and_every_trial(tuned: Any) -> None:
    page = tune_page(tuned)
    assert "<svg" in page
    assert "PSNR against cost" in page
    for words in ("svg-recipe/1", "--time-by density", "a blue square", "noise floor"):
        assert words in page
    assert page.count("prompt 1</dt>") == sum(t.prompt == 0 for t in tuned.trials)
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_page_says_what_was_missed_and_by_how_much() -> None:
    page = tune_page(made_up(found=False))
    assert "No recipe meets this budget" in page
    assert "Nothing that was tried keeps 80 dB; the closest, 40" in page
    assert "svg-recipe" not in page


def test_page_says_on_how_many_prompts_the_recipe_was_measured() -> None:
    found = made_up()
    whole = tune_page(found)
    assert "mean of all prompts" in whole
    assert "Time ran out" not in whole
    early = tuple(t for t in found.trials if t.prompt == 0)
    cut = tune_page(dataclasses.replace(found, trials=early))
    assert "mean of 1 of 2 prompts" in cut
    assert "Time ran out: it was measured on 1 of 2 prompts only." in cut
    assert "mean of all prompts" not in cut


def test_frontier_is_what_no_other_point_beats(tuned: Any) -> None:
    means = tuned.means()
    points = tuned.frontier()
    costs = [means[p][2] for p in points]
    quality = [means[p][1] for p in points]
    assert costs == sorted(costs)
    assert quality == sorted(quality)
    for point, (count, psnr, cost) in means.items():
        if count == 2 and point not in points:
            assert any(means[p][1] >= psnr and means[p][2] <= cost for p in points)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "a budget is a PSNR to reach or a speed-up, as in --psnr 32"),
        ({"psnr": 30, "speedup": 2}, "not both"),
        ({"psnr": 0}, "psnr must be above 0"),
        ({"psnr": math.inf}, "psnr must be a finite number"),
        ({"speedup": 1}, "speedup must be above 1"),
        ({"speedup": "2"}, "speedup must be a number"),
        ({"psnr": 30, "time_by": "second"}, "did you mean 'seconds'"),
        ({"psnr": 30, "budget_minutes": 0}, "budget_minutes must be above 0"),
        ({"psnr": 30, "prompts": "x"}, "prompts must be a list"),
        ({"psnr": 30, "prompts": [" "]}, "each prompt must be a text"),
        ({"psnr": 30, "prompts": ["x", "x"]}, "stands there twice"),
        ({"psnr": 30, "prompts": ["x"], "prompt": "y"}, "give all as prompts"),
        ({"psnrr": 30}, "did you mean 'psnr'"),
        ({"psnr": 30, "fit": "no"}, "fit must be True or False, got 'no'"),
    ],
    ids=str,
)
def test_request_refuses(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        tune(**given)


TINY = ["--size", "48x48", "--frames", "9", "--steps", "3", "--guidance", "2"]


def test_the_command_writes_recipe_page_and_journal(folder: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n", encoding="utf-8")
    words = ["tune", str(tmp_path / "prompts.txt"), "-m", folder, *TINY, "--time-by", "density"]
    words += ["--psnr", "25", "-o", str(tmp_path / "mine.json")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "mine.json") in result.stdout
    recipe = Recipe.read(tmp_path / "mine.json")
    assert recipe.source == "svg tune"
    assert recipe.schedule != Schedule()
    assert (tmp_path / "mine.html").stat().st_size > 10_000
    pipe = tiny.pipeline()
    with sparsify(pipe, recipe=tmp_path / "mine.json") as run:
        tiny.generate(pipe)
    assert run.recipe == recipe
    quiet = CliRunner().invoke(app, [*words, "--quiet"])
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert quiet.stdout.split() == [str(tmp_path / "mine.json")]
    values = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert values["recipe"] == recipe.to_dict()
    assert values["path"] == str(tmp_path / "mine.json")


def test_the_command_writes_no_recipe_that_misses_the_budget(folder: str, tmp_path: Path) -> None:
    words = ["tune", "--prompt", "a red circle", "-m", folder, *TINY, "--time-by", "density"]
    words += ["--psnr", "89", "-o", str(tmp_path / "mine.json")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert "nothing that was tried keeps 89 dB; the closest, " in result.stderr
    assert not (tmp_path / "mine.json").exists()
    assert (tmp_path / "mine.html").exists()
    assert (tmp_path / "mine.journal.json").exists()


def test_request_has_no_option_for_what_only_programs_give() -> None:
    request = TuneRequest(psnr=30)
    assert request.journal is None
    text = CliRunner().invoke(app, ["tune", "--help"]).stdout
    assert "--journal" not in text
    assert "What happens" in text


@pytest.mark.parametrize("time_by", ["density", "seconds"])
def test_tune_counts_the_blocks_that_a_cache_leaves_out(
    loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch, time_by: str
) -> None:
    cached = START.replace(cache="first-block@1")

    class OnlyCached(Search):
        def _search(self) -> None:
            self._evaluate(cached, 1)
            self._evaluate(START, 1)

    monkeypatch.setattr(tuning_run, "Search", OnlyCached)
    clip = {**CLIP, "steps": 6}
    found = tune(psnr=80, model=loaded, prompts=PROMPTS[:1], time_by=time_by, **clip)
    trials = {t.point: t for t in found.trials}
    assert len(found.trials) == 2, "the point without a cache is measured once"
    trial, without = trials[cached], trials[START]
    # Of 6 steps the first computes 3 blocks, the others one.
    assert trial.computed == pytest.approx((3 + 5) / 18)
    assert trial.work < 0.6 * without.work
    assert trial.psnr < without.psnr
    if time_by == "seconds":
        assert trial.doubt == without.doubt
        assert (trial.seconds is None) == (without.seconds is None)
        assert trial.cost < without.cost
    else:
        assert trial.cost == trial.work
