"""Attention in fp8: which calls are, what refuses it, what a run says of it, and that it goes away.

The reference rounds keys and values as the kernel does and runs on any device.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import svg_models
from svg_attention import SVG2, CallRecord, Dense, Schedule, UnsupportedError
from svg_models import sparsify
from svg_models.errors import SettingError
from svg_models.recipe import Layers
from svg_models.report import run_page
from svg_models.sparse import layers, linears

pytestmark = pytest.mark.usefixtures("one_thread")
METHOD = SVG2(q_clusters=4, k_clusters=8, density=0.5)
HALF = Schedule(dense_steps=0.5, dense_layers=0.0)
FP8: dict[str, Any] = {"attention": "fp8", "backend": "reference"}


def relative(found: Tensor, exact: Tensor) -> float:
    """Return the error relative to the clip."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def fp8_steps(records: tuple[CallRecord, ...]) -> set[int | None]:
    return {record.step for record in records if record.backend == "reference_fp8"}


@pytest.mark.parametrize(("start", "steps"), [("sparse", {2}), ("start", {0, 1, 2, 3})])
def test_sparsify_turns_fp8_on_with_the_sparse_steps(start: Any, steps: set[int]) -> None:
    pipe = tiny.pipeline()
    before = tiny.generate(pipe)
    with sparsify(pipe, METHOD, HALF, backend="reference") as run:
        plain = tiny.generate(pipe)
        assert run.stats().fp8_calls == 0
    with sparsify(pipe, METHOD, HALF, fp8_from=start, **FP8) as run:
        rounded = tiny.generate(pipe)
        stats = run.stats()
    assert fp8_steps(stats.records) == steps
    # Three layers, two branches of guidance: all calls of such a step, or none.
    assert stats.fp8_calls == 6 * len(steps)
    assert stats.recipe["attention"] == "fp8"
    assert stats.recipe["fp8_from"] == start
    assert 1e-5 < relative(rounded, plain) < 0.2
    assert torch.equal(tiny.generate(pipe), before)


def test_sparsify_has_dense_layers_of_sparse_steps_in_fp8() -> None:
    pipe = tiny.pipeline()
    schedule = Schedule(dense_steps=0.5, dense_layers=0.4)  # one of three
    with sparsify(pipe, METHOD, schedule, **FP8) as run:
        tiny.generate(pipe)
        records = run.stats().records
    inside = {(record.method, record.backend) for record in records if record.step == 2}
    assert inside == {("Dense", "reference_fp8"), ("SVG2", "reference_fp8")}
    assert fp8_steps(records) == {2}


def test_sparsify_exact_dense_keeps_dense_calls_of_sparse_steps() -> None:
    pipe = tiny.pipeline()
    schedule = Schedule(dense_steps=0.5, dense_layers=0.4)
    with sparsify(pipe, METHOD, schedule, exact_dense=True, **FP8) as run:
        tiny.generate(pipe)
        records = run.stats().records
    assert {r.backend for r in records if r.method == "Dense"} == {""}
    sparse = {r.step: r.backend for r in records if r.method == "SVG2"}
    assert sparse == {2: "reference_fp8", 3: "reference"}


def test_sparsify_dense_in_fp8_from_the_start() -> None:
    pipe = tiny.pipeline()
    before = tiny.generate(pipe)
    with sparsify(pipe, Dense(), fp8_from="start", **FP8) as run:
        rounded = tiny.generate(pipe)
        assert run.stats().fp8_calls == run.stats().calls == 24
    assert 1e-5 < relative(rounded, before) < 0.2


@pytest.mark.parametrize("options", [FP8, {"linears": "fp8"}])
@pytest.mark.parametrize(
    ("method", "schedule"),
    [
        (Dense(), HALF),
        (METHOD, Schedule(dense_steps=1.0, dense_layers=0.0)),
        (METHOD, Schedule(dense_steps=0.0, dense_layers=1.0)),
        (METHOD, Schedule(dense_steps=0.0, dense_layers=0.0, layer_factors=[1e3])),
    ],
)
def test_sparsify_says_that_nothing_is_in_fp8(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], method: Any, schedule: Schedule
) -> None:
    monkeypatch.setattr(layers, "refuse_device", lambda device: None)
    pipe = tiny.pipeline(bfloat16_model())
    with sparsify(pipe, method, schedule, **options) as run:
        with pytest.warns(UserWarning, match="no step of this video is sparse, so none is comp"):
            tiny.generate(pipe)
        assert run.stats().fp8_calls == 0
        assert len(run.messages) == 1


@pytest.mark.parametrize(("steps", "dense", "fp8"), [(4, 3, 0), (12, 10, 0), (12, 9, 1)])
def test_sparsify_says_that_only_steps_at_the_end_are_sparse(
    steps: int, dense: int, fp8: int
) -> None:
    pipe = tiny.pipeline()
    schedule = Schedule(dense_steps=dense / steps, dense_layers=0.0)
    with warnings.catch_warnings(), sparsify(pipe, METHOD, schedule, **FP8) as run:
        warnings.simplefilter("ignore")
        tiny.generate(pipe, num_inference_steps=steps)
        stats = run.stats()
    assert len({record.step for record in stats.sparse_records}) == steps - dense
    assert len(fp8_steps(stats.records)) == fp8
    said = [one for one in run.messages if "none is computed in fp8" in one]
    assert len(said) == (not fp8)
    assert all(one.startswith("only the last steps of this video are sparse") for one in said)


def test_sparsify_says_that_a_chosen_kernel_computes_dense_calls() -> None:
    pipe = tiny.pipeline()
    pipe.transformer.set_attention_backend("native")
    with sparsify(pipe, METHOD, HALF, fp8_from="start", **FP8) as run:
        with pytest.warns(UserWarning, match="by the kernel that set_attention_backend chose"):
            tiny.generate(pipe)
        assert fp8_steps(run.stats().records) == {2, 3}


def bfloat16_model() -> nn.Module:
    narrow = dict(num_attention_heads=2, attention_head_dim=16, ffn_dim=48, text_dim=32)
    return tiny.transformer(num_layers=4, **narrow).bfloat16()


def test_sparsify_with_fp8_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "refuse_device", lambda device: None)
    monkeypatch.setattr(linears, "LEAST_ROWS", 1)
    products = []
    scaled = torch._scaled_mm
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda *a, **k: (products.append(1), scaled(*a, **k))[1]
    )
    pipe = tiny.pipeline(bfloat16_model())
    before = tiny.generate(pipe)
    with sparsify(pipe, METHOD, HALF, linears="fp8", fp8_from="start", **FP8) as run:
        tiny.generate(pipe)
        stats = run.stats()
    assert fp8_steps(stats.records) == {0, 1, 2, 3}
    assert len(products) == 4 * 2 * 20  # four steps, two branches, ten layers a block of two
    assert "linear layers in all steps" in repr(stats)
    assert "32 attention calls" in repr(stats)
    assert torch.equal(tiny.generate(pipe), before)


def test_sparsify_says_that_no_layer_can_be_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "refuse_device", lambda device: None)
    with (
        pytest.warns(UserWarning, match="linears='fp8' found no layer of transformer"),
        sparsify(tiny.pipeline(), METHOD, HALF, linears="fp8"),  # of fp32 weights
    ):
        pass


def test_sparsify_refuses_what_cannot_be_in_fp8() -> None:
    pipe = tiny.pipeline()
    with pytest.raises(UnsupportedError, match="attention='fp8' cannot run here: needs tensors on"):
        sparsify(pipe, METHOD, attention="fp8")
    with pytest.raises(SettingError, match="attention='fp8' has a kernel of its own, and backend"):
        sparsify(pipe, METHOD, attention="fp8", backend="triton")
    with pytest.raises(SettingError, match="attention must be one of bf16, fp8, got 'fp4'"):
        sparsify(pipe, METHOD, attention="fp4")
    with pytest.raises(SettingError, match="exact_dense=True computes dense calls by the model's"):
        sparsify(pipe, METHOD, exact_dense=True, fp8_from="start", **FP8)
    with pytest.raises(SettingError, match="fp8_from says in which step fp8 begins, and nothing"):
        sparsify(pipe, METHOD, fp8_from="start")
    assert not any("svg" in type(p).__module__ for p in pipe.transformer.attn_processors.values())


def test_check_layers_names_the_head_size() -> None:
    with pytest.raises(UnsupportedError, match="heads must have at most 128 channels in e4m3"):
        layers.check_layers(
            Layers(attention="fp8"), "cpu", torch.float32, backend="reference", head_dim=256
        )


def test_slow_in_fp8_names_heads_that_are_padded() -> None:
    fp8 = Layers(attention="fp8")
    assert layers.slow_in_fp8(fp8, "auto", 64).startswith("attention='fp8' pads heads of 64")
    assert not layers.slow_in_fp8(fp8, "auto", 128)
    assert not layers.slow_in_fp8(fp8, "reference", 64)
    assert not layers.slow_in_fp8(Layers(), "auto", 64)


def test_run_page_says_what_is_in_fp8_and_the_command_that_repeats_it() -> None:
    pipe = tiny.pipeline()
    pipe.register_to_config(_name_or_path="some/model")
    with sparsify(pipe, "svg2@0.5", schedule=HALF, fp8_from="start", **FP8) as run:
        tiny.generate(pipe, prompt="a red circle")
        stats = run.stats()
    assert stats.facts["command"].endswith("--backend reference --attention fp8 --fp8-from start")
    page = run_page(stats)
    assert "<dt>attention</dt><dd>fp8</dd>" in page
    assert "<dt>fp8 from</dt><dd>start (24 attention calls)</dd>" in page
    assert stats.to_dict()["fp8_calls"] == 24
    with sparsify(pipe, "svg2@0.5", schedule=HALF) as run:
        tiny.generate(pipe, prompt="a red circle")
        stats = run.stats()
    assert "fp8" not in stats.facts["command"]
    assert "<dt>attention</dt>" not in run_page(stats)


def test_generate_takes_attention_in_fp8() -> None:
    how: dict[str, Any] = dict(method="svg2@0.5", frames=13, width=96, height=96, steps=4, seed=1)
    clip = svg_models.generate("a red circle", **how, **FP8, fp8_from="start")
    assert clip.stats.fp8_calls == clip.stats.calls
    with pytest.raises(UnsupportedError, match="attention='fp8' cannot run here: needs tensors on"):
        svg_models.generate("a red circle", **how, attention="fp8", device="cpu")
    with pytest.raises(SettingError, match="attention must be one of bf16, fp8"):
        svg_models.generate("a red circle", attention="fp16")
    with pytest.raises(SettingError, match="fp8_from must be one of sparse, start"):
        svg_models.generate("a red circle", fp8_from="end")


def test_compare_has_its_dense_clip_without_fp8() -> None:
    found = svg_models.compare(
        "a red circle",
        methods=["svg2@0.5"],
        **dict(frames=13, width=96, height=96, steps=4),
        attention="fp8",
        fp8_from="start",
        backend="reference",
    )
    assert found.dense.stats.fp8_calls == 0
    (candidate,) = found.candidates
    stats = candidate.clip.stats
    assert stats.fp8_calls == stats.calls
    assert found.machine["attention"] == "fp8"
