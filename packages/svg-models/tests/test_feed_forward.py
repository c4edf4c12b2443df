"""Feed-forwards in two products: as near to the truth as their class, only where they may be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

import svg_kernels
from svg_models.families import fused
from svg_models.families.feed_forward import feed_forward
from svg_models.sparse.linears import Fp8FeedForward, Fp8Linear, Fp8Linears

WIDTH = 64


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Say that kernels serve the CPU; return the shapes of inputs of products with a GELU."""
    monkeypatch.setattr(fused, "serves", lambda device: True)
    shapes: list[tuple[int, ...]] = []
    product = torch._addmm_activation

    def call(bias: Tensor, x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return product(bias, x, weight, **options)

    monkeypatch.setattr(torch, "_addmm_activation", call)
    return shapes


def layer(activation: str = "gelu-approximate", **options: Any) -> FeedForward:
    torch.manual_seed(0)
    made = FeedForward(WIDTH, mult=2, activation_fn=activation, **options)
    return made.to(torch.bfloat16).eval()


def states(rows: int = 40) -> Tensor:
    return torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()


def exact(module: FeedForward, x: Tensor) -> Tensor:
    out: Tensor = copy.deepcopy(module).double()(x.double())
    return out


@torch.no_grad()
def test_feed_forward_joins_and_is_no_farther_from_fp64_than_the_class(joined: list[Any]) -> None:
    module, x = layer(), states()
    out, want = feed_forward(module, x), exact(module, x)
    assert joined == [(80, WIDTH)]
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    error, stock = ((y.double() - want).norm() for y in (out, module(x)))
    assert error <= 1.1 * stock
    assert error < 0.01 * want.norm()


def with_hook(module: FeedForward) -> None:
    module.net[0].proj.register_forward_hook(lambda *_: None)


def with_lora(module: FeedForward) -> None:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj"]), module)


def with_dropout(module: FeedForward) -> None:
    module.net[1].p = 0.5
    module.train()


def with_fp32_weight(module: FeedForward) -> None:
    module.net[0].proj.float()


def with_own_forward(module: FeedForward) -> None:
    plain = module.net[0].proj
    plain.forward = lambda x: F.linear(x, plain.weight, plain.bias)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change", [with_hook, with_lora, with_dropout, with_own_forward], ids=lambda f: f.__name__
)
@torch.no_grad()
def test_feed_forward_calls_a_layer_that_something_changed(
    change: Callable[[FeedForward], None], joined: list[Any]
) -> None:
    module, x = layer(), states()
    change(module)
    torch.manual_seed(2)
    out = feed_forward(module, x)
    torch.manual_seed(2)
    assert not joined
    assert torch.equal(out, module(x))


@pytest.mark.parametrize("kind", [{"activation": "geglu"}, {"final_dropout": True}])
@torch.no_grad()
def test_feed_forward_calls_a_layer_of_another_kind(
    kind: dict[str, Any], joined: list[Any], in_place: list[str]
) -> None:
    module, x = layer(**kind), states()
    assert torch.equal(feed_forward(module, x), module(x))
    assert not joined
    assert not in_place


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return of which kind each GELU was that took the place of what it was computed from."""
    kinds: list[str] = []
    gelu = svg_kernels.gelu

    def call(x: Tensor, *, approximate: Any, out: Tensor) -> Tensor:
        assert out is x
        kinds.append(approximate)
        return gelu(x, approximate=approximate, out=out)

    monkeypatch.setattr(svg_kernels, "gelu", call)
    return kinds


@pytest.mark.parametrize("kind", [{"activation": "gelu"}, {"bias": False}])
@torch.no_grad()
def test_feed_forward_computes_a_gelu_where_its_input_is(
    kind: dict[str, Any], joined: list[Any], in_place: list[str]
) -> None:
    module, x = layer(**kind), states()
    before = x.clone()
    out, want = feed_forward(module, x), exact(module, x)
    assert in_place == [module.net[0].approximate]
    assert not joined
    assert torch.equal(x, before)
    error, stock = ((y.double() - want).norm() for y in (out, module(x)))
    assert error <= 1.05 * stock


@pytest.mark.parametrize(
    "change", [with_hook, with_lora, with_dropout, with_own_forward], ids=lambda f: f.__name__
)
@torch.no_grad()
def test_feed_forward_leaves_what_others_may_hold(
    change: Callable[[FeedForward], None], joined: list[Any], in_place: list[str]
) -> None:
    module, x = layer("gelu"), states()
    change(module)
    torch.manual_seed(2)
    out = feed_forward(module, x)
    torch.manual_seed(2)
    assert torch.equal(out, module(x))
    assert not in_place


class Kept(TorchFunctionMode):
    """Keeps what linear layers return."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is F.linear:
            self.products.append(out)
        return out


@torch.no_grad()
def test_feed_forward_leaves_what_a_hook_on_all_modules_keeps(
    joined: list[Any], in_place: list[str]
) -> None:
    module, x, kept = layer("gelu"), states(), {}
    with register_module_forward_hook(lambda each, _, out: kept.update({each: out})):
        out = feed_forward(module, x)
    proj = module.net[0].proj
    assert torch.equal(kept[proj], proj(x))
    assert torch.equal(out, module(x))
    assert not in_place


@torch.no_grad()
def test_feed_forward_leaves_what_a_mode_keeps(joined: list[Any], in_place: list[str]) -> None:
    module, x = layer("gelu"), states()
    with Kept() as mode:
        out = feed_forward(module, x)
    assert torch.equal(mode.products[0], module.net[0].proj(x))
    assert torch.equal(out, module(x))
    assert not in_place


@pytest.mark.gpu
@torch.no_grad()
def test_feed_forward_on_a_gpu_holds_its_hidden_states_once(device: torch.device) -> None:
    module = layer("gelu").to(device)
    x = torch.randn(1, 40_000, WIDTH, device=device, dtype=torch.bfloat16)

    def peak(call: Callable[[], Tensor]) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    stock, ours = peak(lambda: module(x)), peak(lambda: feed_forward(module, x))
    hidden = 2 * WIDTH * x.shape[1] * x.element_size()
    assert stock - ours > 0.4 * hidden  # the result is half as wide


def test_feed_forward_calls_the_layer_where_torch_would_not_join(joined: list[Any]) -> None:
    module, x = layer(), states()
    feed_forward(module, x).sum().backward()  # a gradient
    with torch.no_grad():
        feed_forward(layer().float(), x.float())
        mixed = layer()
        with_fp32_weight(mixed)
        with pytest.raises(RuntimeError, match="dtype"):  # as the class says
            feed_forward(mixed, x)
        feed_forward(nn.Linear(WIDTH, WIDTH, dtype=x.dtype), x)
    assert not joined


@torch.no_grad()
def test_feed_forward_joins_where_fp8_stands_aside(
    joined: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for kind in (Fp8Linear, Fp8FeedForward):
        monkeypatch.setattr(kind, "__call__", lambda self, x, _k=kind: calls.append(_k.__name__))
    blocks = [nn.ModuleList([layer()]) for _ in range(3)]
    linears, x = Fp8Linears(blocks), states(rows=600)
    module: Any = blocks[1][0]
    monkeypatch.setattr(type(module.net[2]), "forward", lambda self, x: x)
    assert linears.layers == 2
    feed_forward(module, x)
    assert joined == [(1200, WIDTH)]
    assert calls == ["Fp8Linear"]  # the second product decides for itself
    linears.begin_forward(fp8=True)
    feed_forward(module, x)
    assert len(joined) == 1
    assert calls[1:] == ["Fp8FeedForward"]
    linears.remove()


@pytest.mark.gpu
@torch.no_grad()
def test_feed_forward_on_a_gpu_is_near_fp64(device: torch.device) -> None:
    module = layer().to(device)
    x = 4 * states(rows=1000).to(device)
    out, want = feed_forward(module, x), exact(module, x)
    stock = (module(x).double() - want).norm()
    assert (out.double() - want).norm() <= 1.1 * stock
