from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from svg_attention import (
    SVG1,
    SVG2,
    Arrivals,
    Call,
    Dense,
    HeadShare,
    RandomBlocks,
    Schedule,
    Session,
    TokenLayout,
    plan,
)
from svg_attention import session as session_module
from svg_attention.methods import svg2
from svg_attention.planning import clusters, order, probes, runs, selection
from svg_attention.session import site_seed

probe_sums = importlib.import_module("svg_attention.planning.probe_sums")

LAYOUT = TokenLayout(grid=(4, 12, 12), text_tokens=10)
METHOD = SVG2(density=0.4, q_clusters=8, k_clusters=24, first_iterations=4)
SPARSE = Schedule(dense_steps=0.25, dense_layers=0.0)


def run_video(session: Session, data: tuple[Tensor, Tensor, Tensor], steps: int = 4) -> Tensor:
    """Play a small generation: two layers, two guidance branches."""
    outputs = []
    for step in range(steps):
        for branch in ("cond", "uncond"):
            for layer in range(2):
                call = Call(step=step, num_steps=steps, layer=layer, num_layers=2, branch=branch)
                shifted = tuple(x + 0.05 * step * (layer + 1) for x in data)
                outputs.append(session.attend(*shifted, layout=LAYOUT, call=call))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "method",
    [
        *(METHOD, replace(METHOD, density=None, top_p=0.7), replace(METHOD, share_steps=2)),
        *(replace(METHOD, compensate=True), replace(METHOD, repair_rows=8)),
        SVG2.corrected(0.7, q_clusters=8, k_clusters=24, repair_rows=8),
        *(SVG1(density=0.6), RandomBlocks(density=0.5), Dense()),
    ],
)
def test_attend_reads_nothing_before_it_has_arrived(
    method: Any, clustered: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> None:
    given = clustered(LAYOUT, seed=1)
    alone, late = (Session(method, SPARSE, layout=LAYOUT, seed=3) for _ in range(2))
    for step in range(4):
        call = Call(step=step, num_steps=4, layer=0, num_layers=1)
        query, *sent = (x + 0.05 * step for x in given)
        coming = [torch.full_like(x, torch.nan) for x in sent]
        pending = {
            name: partial(x.copy_, y)
            for name, x, y in zip(("key", "value"), coming, sent, strict=True)
        }
        share = HeadShare(
            first=0, heads=query.shape[1], gather=lambda x: x, arrivals=Arrivals(**pending)
        )
        found = late.attend(query, *coming, call=call, head_share=share)
        assert torch.equal(found, alone.attend(query, *sent, call=call))


def test_attend_clusters_while_keys_and_values_are_on_their_way(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = clustered(LAYOUT, seed=1)
    seen: list[str] = []

    def noting(name: str, function: Any) -> Any:
        return lambda *args, **options: (seen.append(name), function(*args, **options))[1]

    monkeypatch.setattr(svg2, "cluster_rows", noting("cluster", svg2.cluster_rows))
    monkeypatch.setattr(svg2, "plan_clusters", noting("plan", svg2.plan_clusters))
    monkeypatch.setattr(
        session_module, "sparse_attention", noting("attend", session_module.sparse_attention)
    )
    pending = {name: partial(seen.append, name) for name in ("key", "value")}
    share = HeadShare(
        first=0, heads=query.shape[1], gather=lambda x: x, arrivals=Arrivals(**pending)
    )
    session = Session(METHOD, SPARSE, layout=LAYOUT)
    session.attend(
        query, key, value, call=Call(step=3, num_steps=4, layer=0, num_layers=1), head_share=share
    )
    assert seen == ["cluster", "key", "cluster", "plan", "value", "attend"]


@pytest.mark.parametrize("method", [METHOD, SVG1(density=0.6), RandomBlocks(density=0.5)])
def test_reset_makes_a_session_as_good_as_new(
    method: Any, clustered: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> None:
    first, second = clustered(LAYOUT, seed=1), clustered(LAYOUT, seed=2)
    session = Session(method, SPARSE, seed=3)
    a = run_video(session, first)
    session.reset()
    torch.manual_seed(0)  # The global generator plays no part.
    b = run_video(session, second)
    assert torch.equal(a, run_video(Session(method, SPARSE, seed=3), first))
    assert torch.equal(b, run_video(Session(method, SPARSE, seed=3), second))


def test_reset_is_what_keeps_two_videos_apart(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    first, second = clustered(LAYOUT, seed=1), clustered(LAYOUT, seed=2)
    session = Session(METHOD, SPARSE)
    run_video(session, first)
    stale = run_video(session, second)
    assert not torch.equal(stale, run_video(Session(METHOD, SPARSE), second))


def test_attend_leaves_the_global_generator_alone(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    state = torch.get_rng_state()
    run_video(Session(METHOD, SPARSE), clustered(LAYOUT))
    run_video(Session(SVG1(density=0.6), SPARSE), clustered(LAYOUT))
    assert torch.equal(torch.get_rng_state(), state)


def test_site_seed_is_the_same_in_every_process_and_differs_between_sites() -> None:
    code = "from svg_attention.session import site_seed; print(site_seed(1, 'a', 'b', 2))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert int(found) == site_seed(1, "a", "b", 2)
    sites = [(0, "a", "b", 2), (1, "x", "b", 2), (1, "a", "x", 2), (1, "a", "b", 3)]
    assert len({site_seed(*site) for site in [*sites, (1, "a", "b", 2)]}) == 5


def test_attend_keeps_a_memory_for_each_branch_layer_and_transformer(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    data, other = clustered(LAYOUT, seed=1), clustered(LAYOUT, seed=2)
    fields = {"step": 1, "num_steps": 4, "layer": 1, "num_layers": 2}
    alone = Session(METHOD, SPARSE)
    expected = [alone.attend(*data, layout=LAYOUT, call=Call(**fields)) for _ in range(2)]
    for change in ({"branch": "uncond"}, {"transformer": "transformer_2"}, {"layer": 0}):
        mixed = Session(METHOD, SPARSE)
        found = []
        for _ in range(2):
            mixed.attend(*other, layout=LAYOUT, call=Call(**(fields | change)))
            found.append(mixed.attend(*data, layout=LAYOUT, call=Call(**fields)))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_forget_lets_go_of_one_transformer(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    data = clustered(LAYOUT)

    def attend(session: Session, transformer: str) -> Tensor:
        call = Call(step=1, num_steps=4, layer=0, num_layers=1, transformer=transformer)
        return session.attend(*data, layout=LAYOUT, call=call)

    def held(session: Session) -> dict[str, bool]:
        sites = session._sites.items()
        return {key[0]: site.memory.key_centroids is not None for key, site in sites}

    session, other = (Session(METHOD, SPARSE) for _ in range(2))
    for one in (session, other):
        for transformer in ("first", "second"):
            attend(one, transformer)
    session.forget("first")
    assert held(session) == {"first": False, "second": True}
    assert torch.equal(attend(session, "second"), attend(other, "second"))
    assert attend(session, "first").isfinite().all()
    assert held(session) == {"first": True, "second": True}
    assert len(session.records()) == 4


def test_attend_takes_skipped_steps(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    data = clustered(LAYOUT)
    session = Session(METHOD, SPARSE)
    for step in (2, 7, 5):
        call = Call(step=step, num_steps=8, layer=0, num_layers=2)
        assert session.attend(*data, layout=LAYOUT, call=call).isfinite().all()
    assert [record.step for record in session.records()] == [2, 7, 5]


def test_attend_computes_dense_calls_by_the_models_own_kernel() -> None:
    data = tuple(torch.randn(1, 2, LAYOUT.tokens, 16) for _ in range(3))
    seen = []

    def own(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append(query.shape)
        return query * 2

    session = Session(METHOD, Schedule(dense_steps=0.5, dense_layers=0.0))
    for step in range(4):
        call = Call(step=step, num_steps=4, layer=0, num_layers=1)
        out = session.attend(*data, layout=LAYOUT, call=call, dense=own)
        assert torch.equal(out, data[0] * 2) == (step < 2)
    assert len(seen) == 2
    always = Session(Dense(), SPARSE)
    unknown = Call(step=None, num_steps=None, layer=0, num_layers=1)
    assert torch.equal(always.attend(*data, layout=LAYOUT, call=unknown, dense=own), data[0] * 2)


def test_records_tell_what_ran(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    session = Session(METHOD, SPARSE, profile=True)
    run_video(session, clustered(LAYOUT))
    records = session.records()
    assert len(records) == 16
    for record in records:
        assert record.method == ("Dense" if record.step == 0 else "SVG2")
        assert record.tokens == LAYOUT.tokens
        assert record.seconds > 0
        if record.step:
            assert record.density == pytest.approx(0.4, abs=0.02)
        else:
            assert record.density == 1.0
    assert {(r.branch, r.layer) for r in records} == {
        (branch, layer) for branch in ("cond", "uncond") for layer in (0, 1)
    }
    session.reset()
    assert session.records() == []
    quiet = Session(METHOD, SPARSE)
    run_video(quiet, clustered(LAYOUT))
    assert {record.seconds for record in quiet.records()} == {None}


def test_attend_takes_the_schedule_of_a_transformer_that_has_one(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    own = {"transformer_2": Schedule(dense_steps=0.0, dense_layers=0.0, density=((0.0, 0.5),))}
    session = Session(METHOD, SPARSE, schedules=own, layout=LAYOUT, num_steps=4, num_layers=1)
    for name in ("transformer", "transformer_2"):
        with session.step(0, transformer=name):
            session.attend(*clustered(LAYOUT), layer=0)
    first, second = session.records()
    assert (first.method, second.method) == ("Dense", "SVG2")
    assert 0.4 < second.density <= 0.52
    with pytest.raises(TypeError, match=r"schedule must be a Schedule or None, got 0\.3"):
        Session(METHOD, schedules={"transformer_2": 0.3})  # type: ignore[dict-item]


def test_attend_takes_the_density_of_a_step_from_the_schedule(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    schedule = Schedule(dense_steps=0.0, dense_layers=0.0, density=((0.0, 0.8), (0.75, 0.3)))
    session = Session(METHOD, schedule)
    run_video(session, clustered(LAYOUT))
    by_step = [r.density for r in session.records() if r.layer == 0 and r.branch == "cond"]
    assert by_step == pytest.approx([0.8, 0.633, 0.467, 0.3], abs=0.02)
    session = Session(METHOD, Schedule.sparse([1.0, 0.5, 0.3, 0.3]), num_layers=1, num_steps=4)
    session.layout = LAYOUT
    for step in range(4):
        with session.step(step):
            session.attend(*clustered(LAYOUT), layer=0)
    assert [r.method for r in session.records()] == ["Dense", *["SVG2"] * 3]
    assert [r.density for r in session.records()] == pytest.approx([1, 0.5, 0.3, 0.3], abs=0.02)


def test_attend_multiplies_the_density_by_the_factor_of_a_layer(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    factors = [0.5, 1.5, 9.0]
    schedule = Schedule(dense_steps=0.0, dense_layers=0.0, layer_factors=factors)
    session = Session(METHOD, schedule, layout=LAYOUT, num_steps=1, num_layers=3)
    with session.step(0):
        for layer in range(3):
            session.attend(*clustered(LAYOUT), layer=layer)
    assert [r.method for r in session.records()] == ["SVG2", "SVG2", "Dense"]
    assert [r.density for r in session.records()] == pytest.approx([0.2, 0.6, 1.0], abs=0.02)
    with pytest.raises(ValueError, match="layer_factors multiply a density"):
        Session(replace(METHOD, density=None, top_p=0.7), schedule)


@pytest.mark.parametrize("position", ["first", "last"])
def test_attend_masks_padding_in_dense_calls(position: str) -> None:
    layout = TokenLayout(grid=(2, 10, 11), text_tokens=40, text_position=position)
    query, key, value = (torch.randn(2, 2, layout.tokens, 16) for _ in range(3))
    lengths = torch.tensor([10, 30])
    out = Session(Dense()).attend(
        query,
        key,
        value,
        layout=layout,
        call=Call(step=0, num_steps=4, layer=0, num_layers=3),
        text_lengths=lengths,
    )
    place = torch.arange(layout.tokens) - layout.text_start
    padding = (place >= lengths[:, None]) & (place < 40)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=~padding[:, None, None]
    )
    assert torch.allclose(out, expected, atol=1e-6)


def test_step_and_layer_say_the_same_as_a_call(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    data = clustered(LAYOUT)
    expected = run_video(Session(METHOD, SPARSE, seed=3), data)
    session = Session(METHOD, SPARSE, layout=LAYOUT, num_steps=4, num_layers=2, seed=3)
    outputs = []
    for i in range(4):
        for branch in ("cond", "uncond"):
            with session.step(i, branch=branch):
                for layer in range(2):
                    shifted = tuple(x + 0.05 * i * (layer + 1) for x in data)
                    outputs.append(session.attend(*shifted, layer=layer))
    assert torch.equal(torch.stack(outputs), expected)
    assert {(r.step, r.branch, r.layer) for r in session.records()} == {
        (i, b, n) for i in range(4) for b in ("cond", "uncond") for n in range(2)
    }


def test_step_that_goes_back_begins_a_new_video(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    data = clustered(LAYOUT)
    session = Session(METHOD, SPARSE, layout=LAYOUT, num_steps=4, num_layers=1)

    def play() -> list[Tensor]:
        found = []
        for i in range(4):
            with session.step(i):
                found.append(session.attend(*data, layer=0))
        return found

    first, second = play(), play()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [r.step for r in session.records()] == [0, 1, 2, 3]


def test_attend_asks_for_what_it_was_not_told() -> None:
    data = [torch.randn(1, 2, LAYOUT.tokens, 8) for _ in range(3)]
    session = Session(METHOD, SPARSE, layout=LAYOUT, num_steps=4, num_layers=2)
    with pytest.raises(ValueError, match="which step is this"):
        session.attend(*data, layer=0)
    with session.step(0):
        with pytest.raises(ValueError, match="which layer is this"):
            session.attend(*data)
        with pytest.raises(ValueError, match="layer 2 is not one of the 2 layers"):
            session.attend(*data, layer=2)
        with pytest.raises(TypeError, match="layer must be an integer"):
            session.attend(*data, layer=0.5)
    with pytest.raises(ValueError, match="step 4 is not one of the 4 steps"):
        with session.step(4):
            pass
    lost = Session(METHOD, SPARSE, num_steps=4, num_layers=2)
    with lost.step(0), pytest.raises(ValueError, match="where are the tokens"):
        lost.attend(*data, layer=0)
    with pytest.raises(TypeError, match="method must be a Method"):
        Session("svg2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="schedule must be a Schedule"):
        Session(METHOD, 0.2)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [0, 3])
def test_attend_lays_its_output_out_as_asked(
    step: int, clustered: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> None:
    data = clustered(LAYOUT)
    session = Session(METHOD, SPARSE)
    call = Call(step=step, num_steps=4, layer=0, num_layers=2)
    heads_first = session.attend(*data, layout=LAYOUT, call=call)
    session.reset()
    out = session.attend(*data, layout=LAYOUT, call=call, out_layout="BSHD")
    assert torch.equal(out, heads_first)
    assert out.transpose(1, 2).is_contiguous()


def test_records_are_bounded(clustered: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    session = Session(METHOD, SPARSE, max_records=5)
    run_video(session, clustered(LAYOUT))
    records = session.records()
    assert [(r.step, r.branch, r.layer) for r in records] == [
        (2, "uncond", 1), (3, "cond", 0), (3, "cond", 1), (3, "uncond", 0), (3, "uncond", 1)
    ]  # fmt: skip
    assert all(r.density == pytest.approx(0.4, abs=0.02) for r in records)


def test_attend_enters_planning_once(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, entered = [], []

    def counted(function: Any, calls: list[Any]) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return function(*args, **kwargs)

        return count

    for module in (clusters, plan, order, probes, runs, selection, probe_sums):
        if hasattr(module, "select_planner"):
            counter = counted(module.select_planner, chosen)
            monkeypatch.setattr(module, "select_planner", counter)
    monkeypatch.setattr(svg2, "plan_clusters", counted(svg2.plan_clusters, entered))
    method = replace(METHOD, compensate=True, route="error")
    session = Session(method, SPARSE, layout=LAYOUT, num_steps=4, num_layers=1)
    with session.step(3):
        session.attend(*clustered(LAYOUT), layer=0)
    assert len(entered) == len(chosen) == 1


def test_records_tell_the_density_of_heads_that_differ(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    query, key, value = clustered(LAYOUT)
    flat = torch.cat([query[:, :1], torch.zeros_like(query[:, 1:])], dim=1)
    by_mass = SVG2(q_clusters=4, k_clusters=8, top_p=0.6, density=None)
    session = Session(by_mass, SPARSE, layout=LAYOUT, num_steps=4, num_layers=1)
    with session.step(1):
        session.attend(flat, key, value, layer=0)
        session.attend(flat[:, :1], key[:, :1], value[:, :1], layer=0)
    both, one = session.records()
    assert len(both.head_density) == query.shape[1]
    assert both.head_density[0] < both.head_density[1], "a flat head needs more keys"
    assert sum(both.head_density) / len(both.head_density) == pytest.approx(both.density)
    assert one.head_density == ()


def test_watch_sees_every_sparse_call_and_its_plan(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    seen = []
    session = Session(METHOD, SPARSE, profile=True)
    session.watch = lambda call, query, key, plan: seen.append((call.step, plan.is_full))
    run_video(session, clustered(LAYOUT))
    assert len(seen) == sum(record.method == "SVG2" for record in session.records())
    assert {full for _, full in seen} == {False}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"backend": "trition"}, ValueError, "did you mean 'triton'"),
        ({"backend": None}, ValueError, "unknown backend None"),
        ({"seed": "a"}, TypeError, "seed must be an integer, got 'a'"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
    ],
)
def test_session_checks_settings_when_it_is_made(settings, error, message):
    with pytest.raises(error, match=message):
        Session(SVG2(), **settings)


def test_step_refuses_a_branch_that_is_no_name():
    with (
        pytest.raises(TypeError, match=r"branch must be a string such as 'cond', got \['a'\]"),
        Session(SVG2()).step(0, branch=["a"]),
    ):
        pass


@pytest.mark.skipif(
    importlib.util.find_spec("svg_kernels") is None, reason="svg-kernels is not installed"
)
def test_attend_has_one_call_computed_by_another_backend(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    data = clustered(LAYOUT)
    outputs, records = {}, {}
    for backend in (None, "reference", "reference_fp8"):
        session = Session(METHOD, SPARSE, layout=LAYOUT, num_steps=4, num_layers=1)
        found = []
        for step in (0, 1):  # dense, then sparse
            with session.step(step):
                found.append(session.attend(*data, layer=0, backend=backend))
        outputs[backend], records[backend] = found, session.records()
    for step, density in ((0, 1.0), (1, None)):
        plain, same, rounded = (found[step] for found in outputs.values())
        torch.testing.assert_close(plain, same)
        assert 0.002 < (rounded - plain).norm() / plain.norm() < 0.12
        taken = [kept[step] for kept in records.values()]
        assert [record.backend for record in taken] == ["auto", "reference", "reference_fp8"]
        assert len({record.density for record in taken}) == 1
        assert density is None or taken[0].density == density


def test_attend_records_no_backend_where_the_model_computes(
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    session = Session(METHOD, SPARSE, layout=LAYOUT, num_steps=4, num_layers=1)
    with session.step(0):
        out = session.attend(*clustered(LAYOUT), layer=0, dense=lambda q, k, v: v)
    assert [record.backend for record in session.records()] == [""]
    assert out.shape == clustered(LAYOUT)[0].shape
