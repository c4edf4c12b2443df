"""fp8 products: what is taken over, when they are on, and that all of it goes away again.

torch multiplies e4m3 by scaled rows on a CPU, too; only the device is not refused here.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from svg_attention import SVG2, Dense, Schedule, UnsupportedError
from svg_models import SparseRun, sparsify
from svg_models.errors import SettingError
from svg_models.sparse import linears
from svg_models.sparse.linears import Fp8Linear, Fp8Linears

pytestmark = pytest.mark.usefixtures("one_thread")
METHOD = SVG2(q_clusters=4, k_clusters=8, density=0.5)
HALF = Schedule(dense_steps=0.5, dense_layers=0.0)


@pytest.fixture(autouse=True)
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from svg_models.sparse import layers

    monkeypatch.setattr(layers, "refuse_device", lambda device: None)
    monkeypatch.setattr(linears, "LEAST_ROWS", 1)


def model(layers: int = 4) -> nn.Module:
    narrow = dict(num_attention_heads=2, attention_head_dim=16, ffn_dim=48, text_dim=32)
    return tiny.transformer(num_layers=layers, **narrow).bfloat16()


def taken_over(module: nn.Module) -> int:
    return sum(Fp8Linear.at(m) is not None for m in module.modules())


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def test_fp8_linear_is_near_the_layer() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).bfloat16()
    x = torch.randn(2, 9, 64).bfloat16() * torch.logspace(-2, 2, 9)[:, None].bfloat16()
    exact = copy.deepcopy(layer).double()(x.double())
    block = nn.Sequential(nn.Sequential(), nn.Sequential(layer), nn.Sequential())
    taken = Fp8Linears(block)
    assert taken.layers == 1
    with torch.no_grad():
        assert relative(layer(x), exact) < 0.005
        taken.begin_forward(fp8=True)
        found = layer(x)
        assert found.dtype == x.dtype
        assert 0.005 < relative(found, exact) < 0.05
        # Each row by its own scale: no row is worse than an e4m3 product of its own would be.
        # Rows differ by 10^4, and each has a scale of its own.
        assert all(relative(a, b) < 0.08 for a, b in zip(found[0], exact[0], strict=True))
        taken.remove()
        assert relative(layer(x), exact) < 0.005


def test_largest_at_spreads_evenly_over_half_an_octave() -> None:
    for steps in (2, 5, 14, 40):
        largest = torch.tensor([linears.largest_at(step) for step in range(3, 3 + steps)])
        logs = 2 * (448 / largest).log2().sort().values
        assert 0 <= logs[0] < logs[-1] < 1
        gaps = torch.cat([logs.diff(), logs[:1] + 1 - logs[-1:]])  # the last, around the end
        # Of points on a circle, multiples of the golden ratio leave gaps of at most three lengths.
        assert gaps.max() < 2.7 * gaps.min()
        assert gaps.min() > 0.38 / steps


def test_begin_forward_rounds_weights_by_another_grid_at_each_step() -> None:
    torch.manual_seed(4)
    layer = nn.Linear(256, 64).bfloat16()
    taken = Fp8Linears(nn.Sequential(nn.Sequential(), nn.Sequential(layer), nn.Sequential()))
    (forward,) = taken._linears()
    exact = layer.weight.detach().double()

    def rounded(step: int) -> Tensor:
        taken.begin_forward(fp8=True, step=step)
        weight, scale, largest = forward._converted or forward.convert()
        assert largest == linears.largest_at(step)
        return (weight.double() * scale.double()).t()

    weights = [rounded(step) for step in range(14)]
    errors = [relative(weight, exact) for weight in weights]
    # No grid is worse than another, and together they are five times as good as one.
    assert all(0.02 < error < 0.03 for error in errors)
    assert relative(torch.stack(weights).mean(0), exact) < 0.2 * max(errors)
    assert torch.equal(rounded(3), weights[3])


@pytest.mark.parametrize("where", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_fp8_linear_is_nearer_on_average_over_steps(where: str, device: torch.device) -> None:
    torch.manual_seed(5)
    layer = nn.Linear(512, 256).bfloat16().to(device)
    x = torch.randn(1024, 512).bfloat16().to(device)
    exact = copy.deepcopy(layer).double()(x.double())
    quantised, scale = linears.quantise_rows(x)  # alike at each step, so this error stays
    rounded = copy.deepcopy(layer).double()(quantised.double() * scale.double())
    taken = Fp8Linears(nn.Sequential(nn.Sequential(), nn.Sequential(layer), nn.Sequential()))
    found = []
    for step in range(14):
        taken.begin_forward(fp8=True, step=step)
        found.append(layer(x).double())
    errors = [relative(one, exact) for one in found]
    assert all(0.03 < error < 0.045 for error in errors)
    mean = torch.stack(found).mean(0)
    assert relative(mean, rounded) < 0.3 * relative(found[0], rounded)
    assert relative(mean, exact) < 0.8 * min(errors)


def test_begin_forward_converts_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[int] = []
    convert = Fp8Linear.convert
    monkeypatch.setattr(Fp8Linear, "convert", lambda self: (converted.append(1), convert(self))[1])
    layer = nn.Linear(64, 48).bfloat16()
    taken = Fp8Linears(nn.Sequential(nn.Sequential(), nn.Sequential(layer), nn.Sequential()))
    # Two branches of guidance, a pass that is not in fp8, and the next step.
    for step, fp8 in ((4, True), (4, True), (4, False), (4, True), (5, True)):
        taken.begin_forward(fp8=fp8, step=step)
    assert len(converted) == 2
    taken.release()
    taken.begin_forward(fp8=True, step=5)
    assert len(converted) == 3


@torch.no_grad()
def test_begin_forward_converts_what_passes_in_fp8_have_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linears, "LEAST_ROWS", 8)
    wide, few = nn.Linear(64, 48).bfloat16(), nn.Linear(64, 48).bfloat16()
    taken = Fp8Linears(nn.Sequential(nn.Sequential(), nn.Sequential(wide, few), nn.Sequential()))
    video, text = torch.randn(8, 64).bfloat16(), torch.randn(7, 64).bfloat16()

    def held() -> list[bool]:
        return [forward._converted is not None for forward in taken._linears()]

    taken.begin_forward(fp8=False, step=0)
    wide(video), few(text)
    taken.begin_forward(fp8=True, step=1)
    assert held() == [True, True]
    wide(video), few(text)
    assert held() == [True, False]
    taken.begin_forward(fp8=True, step=2)
    assert held() == [True, False]
    assert torch.equal(few(text), nn.functional.linear(text, few.weight, few.bias))
    few(video)  # after all
    taken.begin_forward(fp8=True, step=3)
    assert held() == [True, True]


def test_sparsify_in_fp8_takes_up_weights_where_no_step_is_known() -> None:
    module = model()
    inputs = {
        name: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in tiny.forward_inputs().items()
    }

    def made() -> Tensor:
        with torch.no_grad():  # no pipeline, and nobody says where the video stands
            out: Tensor = module(**inputs)[0]
            return out

    how: dict[str, Any] = {"linears": "fp8", "fp8_from": "start"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sparsify(module, METHOD, HALF, **how) as run:
            before = made()
            with torch.no_grad():
                for block in module.blocks:
                    block.ffn.net[2].weight.mul_(1.5)
            changed = made()
        assert "cannot tell the denoising step" in run.messages[0]
        with sparsify(module, METHOD, HALF, **how):
            assert torch.equal(made(), changed)
    assert not torch.equal(changed, before)


def test_inputs_quantise_a_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    whole = linears.quantise_rows
    monkeypatch.setattr(linears, "quantise_rows", lambda *a: (calls.append(1), whole(*a))[1])
    inputs = linears.Inputs()
    x = torch.randn(4, 16)
    first = inputs.quantise(x)
    assert inputs.quantise(x) is first
    x += 1
    assert inputs.quantise(x) is not first
    assert inputs.quantise(torch.randn(4, 16)) is not first
    assert len(calls) == 3
    kept = weakref.ref(inputs.quantise(x)[0])
    del first, x
    gc.collect()
    assert kept() is None


def test_is_plain_linear_leaves_out_what_is_no_plain_layer() -> None:
    block = nn.ModuleDict(
        {
            "plain": nn.Linear(16, 16).bfloat16(),
            "norm": nn.ModuleDict({"linear": nn.Linear(16, 16).bfloat16()}),
            "wide": nn.Linear(16, 16),
            "odd": nn.Linear(17, 16).bfloat16(),
            "hooked": nn.Linear(16, 16).bfloat16(),
            "stored_in_fp8": nn.Linear(16, 16).to(torch.float8_e4m3fn),
        }
    )
    block["hooked"].register_forward_hook(lambda module, args, out: out)
    found = [
        path for path, module in block.named_modules() if linears.is_plain_linear(path, module)
    ]
    assert found == ["plain"]


def test_first_and_last_block_stay() -> None:
    pipe = tiny.pipeline(model())
    with sparsify(pipe, METHOD, HALF, linears="fp8"):
        blocks = pipe.transformer.blocks
        inside = [[Fp8Linear.at(m) is not None for m in b.modules()] for b in blocks]
    assert [any(block) for block in inside] == [False, True, True, False]
    assert not any(Fp8Linear.at(m) is not None for m in pipe.transformer.modules())


@pytest.mark.parametrize(("start", "fp8_steps"), [("sparse", 1), ("start", 4)])
def test_sparsify_turns_fp8_on_with_the_sparse_steps(
    start: str, fp8_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny.pipeline(model())
    products = []
    scaled = torch._scaled_mm
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda *a, **k: (products.append(1), scaled(*a, **k))[1]
    )
    before = tiny.generate(pipe)
    assert not products
    with sparsify(pipe, METHOD, HALF, linears="fp8", fp8_from=start) as run:
        layers = run._engine.fast_layers["transformer"].linears
        assert layers is not None
        count = layers.layers
        tiny.generate(pipe)
        # Ten layers a block of two, twice a step for guidance.
        assert count == 20
        assert len(products) == 2 * fp8_steps * count
    products.clear()
    assert torch.equal(tiny.generate(pipe), before)
    assert not products


def test_sparsify_in_fp8_leaves_a_dense_run_alone() -> None:
    pipe = tiny.pipeline(model())
    before = tiny.generate(pipe)
    with (
        sparsify(pipe, Dense(), HALF, linears="fp8", fuse=False),
        pytest.warns(UserWarning, match="none is computed in fp8"),
    ):
        assert torch.equal(tiny.generate(pipe), before)


def test_sparsify_in_fp8_takes_up_weights_that_change_between_videos() -> None:
    pipe = tiny.pipeline(model())
    with sparsify(pipe, METHOD, HALF, linears="fp8"):  # one step in fp8, the same in each video
        before = tiny.generate(pipe)
        assert torch.equal(tiny.generate(pipe), before)
        with torch.no_grad():
            for block in pipe.transformer.blocks:
                block.ffn.net[2].weight.mul_(1.5)
        changed = tiny.generate(pipe)
    with sparsify(pipe, METHOD, HALF, linears="fp8"):
        assert torch.equal(tiny.generate(pipe), changed)
    assert not torch.equal(changed, before)


def test_sparsify_in_fp8_keeps_the_weights_and_what_is_saved() -> None:
    pipe = tiny.pipeline(model())
    weights = dict(pipe.transformer.named_parameters())
    saved = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    with sparsify(pipe, METHOD, HALF, linears="fp8"):
        tiny.generate(pipe)
        now = pipe.transformer.state_dict()
        assert now.keys() == saved.keys()
        assert all(torch.equal(now[name], saved[name]) for name in saved)
        copied = copy.deepcopy(pipe.transformer)
    assert dict(pipe.transformer.named_parameters()) == weights
    x = torch.randn(1, 4, 32).bfloat16()
    with torch.no_grad():
        layer, twin = (m.blocks[1].ffn.net[0].proj for m in (pipe.transformer, copied))
        assert torch.equal(layer(x), twin(x))


def test_sparsify_refuses_what_cannot_be_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline(model())
    with pytest.raises(
        SettingError, match="linears must be one of bf16, fp8, got 'fp8e4'; did you mean 'fp8'"
    ):
        sparsify(pipe, METHOD, HALF, linears="fp8e4")
    with pytest.raises(SettingError, match="fp8_from must be one of sparse, start"):
        sparsify(pipe, METHOD, HALF, linears="fp8", fp8_from="end")
    with pytest.raises(UnsupportedError, match="needs a CUDA device, the transformer is on 'cpu'"):
        linears.refuse_device(torch.device("cpu"))


@pytest.mark.parametrize("hooked", [False, True])
def test_fp8_feed_forward_quantises_what_its_activation_gives(
    monkeypatch: pytest.MonkeyPatch, hooked: bool
) -> None:
    torch.manual_seed(2)
    whole = FeedForward(32, inner_dim=64, activation_fn="gelu-approximate").bfloat16().eval()
    block = nn.Sequential(nn.Sequential(), nn.Sequential(whole), nn.Sequential())
    x = torch.randn(2, 9, 32).bfloat16()
    asked = []
    quantise = linears.quantise_rows
    monkeypatch.setattr(
        linears,
        "quantise_rows",
        lambda x, *a, **k: (asked.append(*a or ["none"]), quantise(x, *a, **k))[1],
    )
    exact = copy.deepcopy(whole).double()(x.double())
    seen = []
    if hooked:
        whole.net[2].register_forward_hook(lambda module, args, out: seen.append(1))
    taken = Fp8Linears(block)
    with torch.no_grad():
        taken.begin_forward(fp8=True)  # converts the weights
        asked.clear()
        assert relative(whole(x), exact) < 0.08
        assert asked == (["none"] if hooked else ["none", "gelu_tanh"])
        assert seen == [1] * hooked
        twin = copy.deepcopy(whole)
        taken.remove()
        asked.clear()
        assert torch.equal(whole(x), twin(x))
    assert not asked
    assert "forward" not in whole.__dict__


def test_fp8_linears_are_on_for_one_thread_and_not_for_another() -> None:
    torch.manual_seed(3)
    layer = nn.Linear(64, 48).bfloat16()
    taken = Fp8Linears(nn.Sequential(nn.Sequential(), nn.Sequential(layer), nn.Sequential()))
    x = torch.randn(9, 64).bfloat16()
    with torch.no_grad():
        plain = layer(x)
        taken.begin_forward(fp8=True)
        in_fp8 = layer(x)
        with ThreadPoolExecutor(1) as other:
            assert torch.equal(other.submit(torch.no_grad()(layer), x).result(), plain)
        assert torch.equal(layer(x), in_fp8)
    assert not torch.equal(plain, in_fp8)


def test_fp8_linear_keeps_the_grid_of_its_thread_where_another_is_at_another_step() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48).bfloat16(), torch.randn(9, 64).bfloat16()
    taken = Fp8Linears(nn.Sequential(nn.Sequential(), nn.Sequential(layer), nn.Sequential()))

    def product(step: int | None) -> Tensor:
        if step is not None:
            taken.begin_forward(fp8=True, step=step)
        with torch.no_grad():
            out: Tensor = layer(x)
            return out

    alone = product(3)
    with ThreadPoolExecutor(1) as other:
        theirs = other.submit(product, 7).result()
        assert not torch.equal(theirs, alone)
        assert torch.equal(product(None), alone)
        assert torch.equal(other.submit(product, None).result(), theirs)


def test_fp8_linears_of_a_further_run_find_what_the_first_has_compiled() -> None:
    torch._dynamo.reset()
    pipe = tiny.pipeline(model())
    for block in pipe.transformer.blocks:
        block.compile(fullgraph=True, backend="eager")

    def clip() -> Tensor:
        with sparsify(pipe, METHOD, HALF, linears="fp8", fp8_from="start"):
            return tiny.generate(pipe, num_inference_steps=2)

    first = clip()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(clip(), first)
        for weight in pipe.transformer.blocks[1].ffn.parameters():
            weight.data *= 1.5
        assert not torch.equal(clip(), first), "weights are converted anew"
    assert taken_over(pipe.transformer) == 0


def test_fp8_linears_of_many_blocks_share_a_graph() -> None:
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    pipe = tiny.pipeline(model(layers=12))  # a compiler gives up after eight graphs of a function
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    with sparsify(pipe, METHOD, HALF, linears="fp8", fp8_from="start"):
        tiny.generate(pipe, num_inference_steps=2)
    assert graphs == 2  # the first block and the last are not in fp8


def test_fp8_linears_in_a_compiled_block() -> None:
    torch.manual_seed(3)
    block = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)).bfloat16()
    taken = Fp8Linears(nn.Sequential(nn.Sequential(), block, nn.Sequential()))
    x = torch.randn(9, 64).bfloat16()
    exact = copy.deepcopy(block).double()(x.double())
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    with torch.no_grad():
        for on in (False, True, False):
            taken.begin_forward(fp8=on)
            assert (relative(compiled(x), exact) > 0.008) == on
        # A step has other weights, and the graph of the one before.
        taken.begin_forward(fp8=True, step=1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            one = compiled(x)
            assert torch.equal(one, block(x))
            taken.begin_forward(fp8=True, step=2)
            two = compiled(x)
            assert torch.equal(two, block(x))
    assert not torch.equal(one, two)


def test_sparsify_in_fp8_can_be_pickled() -> None:
    pipe = tiny.pipeline(model())
    x = torch.randn(1, 4, 32).bfloat16()
    with sparsify(pipe, METHOD, HALF, linears="fp8"):
        copied = pickle.loads(pickle.dumps(pipe.transformer.blocks[1].ffn))
    with torch.no_grad():
        assert torch.equal(copied(x), pipe.transformer.blocks[1].ffn(x))


def test_sparsify_holds_converted_weights_of_the_transformer_that_runs() -> None:
    pipe = tiny.pipeline(model(), model(), boundary_ratio=0.9)
    seen: list[tuple[str, list[int]]] = []

    def held(run: SparseRun) -> list[int]:
        layers = [run._engine.fast_layers[n].linears for n in ("transformer", "transformer_2")]
        assert all(one is not None for one in layers)
        return [
            sum(getattr(f, "_converted", None) is not None for f in one._forwards)
            for one in layers
            if one is not None
        ]

    with sparsify(pipe, METHOD, HALF, linears="fp8", fp8_from="start") as run:
        assert held(run) == [0, 0]
        for name in ("transformer", "transformer_2"):
            getattr(pipe, name).register_forward_hook(
                lambda *_, name=name: seen.append((name, held(run)))
            )
        first = tiny.generate(pipe)
        assert {(name, *counts) for name, counts in seen} == {
            ("transformer", 20, 0),
            ("transformer_2", 0, 20),
        }
        assert torch.equal(tiny.generate(pipe), first)
    assert not forwards_of(pipe)


def forwards_of(pipe: Any) -> list[Fp8Linear]:
    found = (Fp8Linear.at(m) for m in pipe.transformer.modules())
    return [one for one in found if one is not None]
