"""Guidance branches of a step, and steps in a row, that read alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_bias import CLUSTERS, LAYOUT, draw
from torch import Tensor

from svg_attention import (
    SVG2,
    LayerMemory,
    Schedule,
    Session,
    SparsePlan,
    TokenLayout,
    sparse_attention,
)

SHARED = SVG2(**CLUSTERS, correct_bias=True, share_branches=True)
Tensors = tuple[Tensor, Tensor, Tensor]


def branches(kind: str = "clustered") -> tuple[Tensors, Tensors]:
    """Return the calls of two branches that differ by a little."""
    cond = draw(kind)
    generator = torch.Generator().manual_seed(5)
    query, key, value = (
        x + 0.15 * x.std() * torch.randn(x.shape, generator=generator) for x in cond
    )
    return cond, (query, key, value)


def plans_of(
    method: SVG2, calls: tuple[Tensors, Tensors], **options: Any
) -> tuple[SparsePlan, SparsePlan]:
    """Return the plans of the first branch and of the one that follows."""
    layout = options.pop("layout", LAYOUT)
    memory, other = LayerMemory(), LayerMemory()
    lengths = options.pop("text_lengths", (None, None))
    first = method.plan(
        *calls[0], layout=layout, memory=memory, text_lengths=lengths[0],
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    second = method.plan(
        *calls[1], layout=layout, memory=other, leader=memory, text_lengths=lengths[1],
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    return first, second


@pytest.mark.parametrize("route", ["mass", "error"])
@pytest.mark.parametrize("compensate", [False, True])
def test_a_branch_reads_what_the_first_one_reads(route: Any, compensate: bool) -> None:
    if route == "error" and not compensate:
        pytest.skip("error routing needs compensation")
    settings = {**CLUSTERS, "route": route, "compensate": compensate}
    calls = branches()
    first, second = plans_of(SVG2(**settings, share_branches=True), calls)
    for name in ("run_starts", "run_lengths", "query_order", "key_order"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert second.probe_density == 0
    if not compensate:
        assert second.summary is None
        return
    # Centroids are means of the branch's own keys and values.
    own, theirs = first.summary, second.summary
    assert own is not None
    assert theirs is not None
    torch.testing.assert_close(own.log_weights, theirs.log_weights)
    end = int(LAYOUT.video_tokens)
    order = second.key_order[0, 0, :end].long()
    sizes = (own.log_weights.exp()[0, 0].amax(0)).round().long()
    cluster = int(sizes.argmax())
    lengths = plan_sizes(first)
    start = int(lengths[:cluster].sum())
    mine = order[start : start + int(lengths[cluster])]
    torch.testing.assert_close(theirs.keys[0, 0, cluster], calls[1][1][0, 0, mine].mean(0))
    torch.testing.assert_close(theirs.values[0, 0, cluster], calls[1][2][0, 0, mine].mean(0))


def plan_sizes(plan: SparsePlan) -> Tensor:
    """Return the sizes of the key clusters of the first head, by clustering again."""
    memory = LayerMemory()
    SHARED.plan(
        *branches()[0], layout=LAYOUT, memory=memory, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(
        memory.choice.key_clusters.order, plan.key_order[:, :, : LAYOUT.video_tokens]
    )
    return memory.choice.key_clusters.sizes[0, 0]


def test_the_bias_of_a_choice_is_kept_to_a_thirtieth_of_a_nat() -> None:
    first, second = plans_of(SHARED, branches())
    assert first.summary is not None
    assert second.summary is not None
    finite = first.summary.log_weights.isfinite()
    assert torch.equal(finite, second.summary.log_weights.isfinite())
    off = (first.summary.log_weights - second.summary.log_weights)[finite].abs().max()
    assert 0 < off <= 8 / 254 / 2 + 1e-5


@pytest.mark.parametrize("repair", [0, 64])
@pytest.mark.parametrize("route", ["mass", "error"])
def test_what_branches_leave_out_cancels_where_guidance_takes_their_difference(
    route: str, repair: int
) -> None:
    settings = {**CLUSTERS, "route": route, "repair_rows": repair, "density": 0.1}
    calls = branches()
    exact = [F.scaled_dot_product_attention(*call) for call in calls]

    def guided_error(share: bool) -> float:
        plans = plans_of(SVG2(**settings, share_branches=share), calls)
        cond, uncond = (
            sparse_attention(*call, plan) - x
            for call, plan, x in zip(calls, plans, exact, strict=True)
        )
        return float((4 * cond - 3 * uncond).square().mean())

    assert guided_error(True) < 0.6 * guided_error(False)


def test_a_session_follows_within_a_step_and_chooses_anew_in_the_next() -> None:
    cond, uncond = branches()
    session = Session(SHARED, Schedule.sparse(), layout=LAYOUT, num_steps=2, num_layers=1)
    for step in range(2):
        for name, call in (("cond", cond), ("uncond", uncond)):
            with session.step(step, branch=name):
                session.attend(*call, layer=0)
    first, second, third, fourth = session.records()
    assert first.probe_density == third.probe_density > 0
    assert second.probe_density == fourth.probe_density == 0
    assert first.density == second.density
    sites = session._sites
    assert sites["transformer", "cond", 0, "cpu"].memory.query_centroids is not None
    assert sites["transformer", "uncond", 0, "cpu"].memory.query_centroids is None
    session.reset()
    assert not session._leaders


@pytest.mark.parametrize("share", [False, True])
def test_steps_in_a_row_follow_the_first_of_them(share: bool) -> None:
    cond, uncond = branches()
    method = replace(SHARED, share_branches=share, share_steps=3)
    session = Session(method, Schedule.sparse(), layout=LAYOUT, num_steps=5, num_layers=1)
    for step in range(5):
        for name, call in (("cond", cond), ("uncond", uncond)):
            with session.step(step, branch=name):
                session.attend(*call, layer=0)
    chose = [record.probe_density > 0 for record in session.records()]
    second = not share
    assert chose == [True, second, False, False, False, False, True, second, False, False]


def test_a_step_of_another_density_chooses_for_itself() -> None:
    cond, _ = branches()
    method = replace(SHARED, share_steps=4, density=0.4)
    schedule = Schedule(density=[0.4, 0.4, 0.2, 0.2], dense_steps=0.0, dense_layers=0.0)
    session = Session(method, schedule, layout=LAYOUT, num_steps=4, num_layers=1)
    for step in range(4):
        with session.step(step):
            session.attend(*cond, layer=0)
    records = session.records()
    assert [record.probe_density > 0 for record in records] == [True, False, True, False]
    assert records[3].density is not None
    assert records[3].density < 0.25


def test_a_call_of_another_shape_chooses_for_itself() -> None:
    cond, _ = branches()
    small = TokenLayout(grid=(4, 12, 16), text_tokens=0)
    memory = LayerMemory()
    SHARED.plan(*cond, layout=LAYOUT, memory=memory)
    tensors = [x[:, :1, : small.tokens] for x in cond]
    plan = SHARED.plan(*tensors, layout=small, leader=memory)
    assert plan.probe_density > 0


@pytest.mark.parametrize("text_position", ["first", "last"])
def test_a_branch_keeps_its_own_text(text_position: Any) -> None:
    layout = TokenLayout(grid=(4, 12, 14), text_tokens=24, text_position=text_position)
    calls = tuple(tuple(x[:, :, : layout.tokens] for x in call) for call in branches())
    lengths = (torch.tensor([24]), torch.tensor([5]))
    method = SVG2(**{**CLUSTERS, "density": 0.9}, repair_rows=64, share_branches=True)
    _, plan = plans_of(method, calls, layout=layout, text_lengths=lengths)  # type: ignore[arg-type]
    place = torch.arange(layout.tokens) - layout.text_start
    mask = ((place < 0) | (place >= 24) | (place < 5))[None, None, None]
    exact = F.scaled_dot_product_attention(*calls[1], attn_mask=mask)
    out = sparse_attention(*calls[1], plan)
    video = slice(layout.video_start, layout.video_start + layout.video_tokens)
    assert (out - exact)[:, :, video].abs().mean() < 5e-3
    valid = slice(layout.text_start, layout.text_start + 5)
    torch.testing.assert_close(out[:, :, valid], exact[:, :, valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_head_that_is_not_finite_in_the_following_branch_is_dense(bad: float, side: int) -> None:
    cond, uncond = branches()
    uncond[side][0, 1, 7, 3] = bad
    first, second = plans_of(SHARED, (cond, uncond))
    assert first.broken is not None
    assert not first.broken.any()
    assert second.broken is not None
    assert second.broken.tolist() == [[False, True]]
    assert second.density()[0, 1] == 1
    assert sparse_attention(*uncond, second)[0, 0].isfinite().all()


def test_share_branches_names_wrong_settings() -> None:
    with pytest.raises(ValueError, match="spare the probes that correct_residual needs"):
        SVG2(**CLUSTERS, share_branches=True, correct_residual=True)
    with pytest.raises(ValueError, match="spare the probes that correct_residual needs"):
        SVG2(**CLUSTERS, share_steps=2, correct_residual=True)
    with pytest.raises(ValueError, match="share_steps must be at least 1"):
        SVG2(**CLUSTERS, share_steps=0)


@pytest.mark.gpu
def test_both_branches_are_captured_and_replayed_with_new_data(device: torch.device) -> None:
    layout = TokenLayout(grid=(5, 16, 20))
    draw_on = torch.Generator(device=device).manual_seed(0)
    shape = (2, 3, 1, 4, layout.tokens, 128)
    data = torch.randn(shape, device=device, generator=draw_on).to(torch.bfloat16)
    method = SVG2.corrected(0.4, q_clusters=5, k_clusters=9)
    first = LayerMemory()
    method.plan(*data[0], layout=layout, memory=first, generator=draw_on)

    def step() -> Tensor:
        memory = replace(first, choice=None)
        cond = method.plan(*data[0], layout=layout, memory=memory)
        uncond = method.plan(*data[1], layout=layout, memory=LayerMemory(), leader=memory)
        return 4 * sparse_attention(*data[0], cond) - 3 * sparse_attention(*data[1], uncond)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    data.copy_(torch.randn(shape, device=device, generator=draw_on))
    out.fill_(torch.nan)
    graph.replay()
    replayed = out.clone()
    assert torch.equal(replayed, step())
