"""Norms that write fp8: for layers that take it, and for nothing else.

There is no GPU here, so the reference backend computes for the kernels where a test says it serves;
torch multiplies e4m3 by scaled rows on a CPU, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.transformers.transformer_cosmos import CosmosTransformerBlock
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformerBlock
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2TransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import svg_kernels
from svg_attention import SVG2, Schedule
from svg_models import sparsify
from svg_models.families import fused
from svg_models.families.blocks import (
    COSMOS_BLOCKS,
    HUNYUAN_VIDEO_BLOCKS,
    WAN_BLOCKS,
    BlockRule,
    FusedForward,
)
from svg_models.families.fp8_rows import Fp8Rows, reads_fp8_rows
from svg_models.sparse import layers, linears
from svg_models.sparse.linears import Fp8Linears

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, TOKENS = 32, 20
NORMS = ("layer_norm_modulate_fp8", "gate_residual_norm_fp8")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "serves", lambda device: True)
    monkeypatch.setattr(layers, "refuse_device", lambda device: None)
    monkeypatch.setattr(linears, "LEAST_ROWS", 8)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the norms that wrote fp8."""
    names: list[str] = []
    for name in NORMS:
        launch = getattr(svg_kernels, name)

        def call(*args: Any, _name: str = name, _launch: Any = launch, **options: Any) -> Any:
            names.append(_name)
            return _launch(*args, **options)

        monkeypatch.setattr(svg_kernels, name, call)
    return names


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def wan() -> tuple[nn.Module, BlockRule, tuple[Any, ...]]:
    block = WanTransformerBlock(WIDTH, 48, 2, cross_attn_norm=True)
    return block, WAN_BLOCKS[0], (normal(1, 6, WIDTH), None)


def wan_without_cross_norm() -> tuple[nn.Module, BlockRule, tuple[Any, ...]]:
    block = WanTransformerBlock(WIDTH, 48, 2, cross_attn_norm=False)
    return block, WAN_BLOCKS[0], (normal(1, 6, WIDTH), None)


def wan_with_image() -> tuple[nn.Module, BlockRule, tuple[Any, ...]]:
    block = WanTransformerBlock(WIDTH, 48, 2, cross_attn_norm=True, added_kv_proj_dim=WIDTH)
    return block, WAN_BLOCKS[0], (normal(1, 6, WIDTH), None)


def skyreels() -> tuple[nn.Module, BlockRule, tuple[Any, ...]]:
    block = SkyReelsV2TransformerBlock(WIDTH, 48, 2, cross_attn_norm=True)
    return block, WAN_BLOCKS[0], (normal(1, 6, WIDTH), None, None)


def cosmos() -> tuple[nn.Module, BlockRule, tuple[Any, ...]]:
    block = CosmosTransformerBlock(2, 16, WIDTH, adaln_lora_dim=16)
    return block, COSMOS_BLOCKS[0], (normal(1, TOKENS, WIDTH), None)


def hunyuan() -> tuple[nn.Module, BlockRule, tuple[Any, ...]]:
    block = HunyuanVideoTransformerBlock(2, 16, mlp_ratio=1.5)
    return block, HUNYUAN_VIDEO_BLOCKS[0], (normal(1, WIDTH),)


# The norms of a block that write fp8: before self-attention, cross-attention and feed-forward.
BLOCKS = {
    wan: 3,
    wan_without_cross_norm: 2,
    wan_with_image: 3,
    skyreels: 3,
    cosmos: 3,
    hunyuan: 1,  # its attention joins two streams first, and the text has too few rows
}


class Made:
    """A block in bf16 whose norms and fp8 products are on, and what it is called with."""

    def __init__(self, make: Callable[[], tuple[nn.Module, BlockRule, tuple[Any, ...]]]) -> None:
        torch.manual_seed(0)
        self.block, rule, rest = make()
        for name, weight in self.block.named_parameters():
            if "table" in name or ("norm" in name and "linear" in name):
                weight.data.normal_(0.0, 0.3)
        self.block.bfloat16().requires_grad_(False)
        text = 512 + 6 if make is wan_with_image else 6
        self.args = (normal(1, TOKENS, WIDTH), normal(1, text, WIDTH), *rest)
        self.linears = Fp8Linears([nn.Identity(), self.block, nn.Identity()])
        FusedForward.install(self.block, rule)
        self.linears.begin_forward(fp8=True, step=3)

    @torch.no_grad()
    def __call__(self) -> list[Tensor]:
        out = self.block(*self.args)
        return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("make", BLOCKS, ids=lambda make: make.__name__)
def test_blocks_give_the_same_bits_where_norms_write_fp8(
    make: Any, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(make)
    found = made()
    assert len(launches) == BLOCKS[make]
    monkeypatch.setattr("svg_models.families.blocks.reads_fp8_rows", lambda *_: False)
    plain = made()
    assert len(launches) == BLOCKS[make]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    made.linears.begin_forward(fp8=False)
    bf16 = made()
    assert not torch.equal(bf16[0], found[0])  # products were in fp8
    assert (bf16[0] - found[0]).norm() < 0.1 * bf16[0].norm()


def test_norms_write_bf16_while_products_are_in_bf16(launches: list[str]) -> None:
    made = Made(wan)
    made.linears.begin_forward(fp8=False)
    made()
    assert not launches
    made.linears.begin_forward(fp8=True, step=3)
    made()
    made.linears.remove()
    made()
    assert len(launches) == 3


def hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: None)


def accelerate(module: nn.Module) -> None:
    add_hook_to_module(module, ModelHook())


def foreign_processor(module: Any) -> None:
    class Other(type(module.processor)):  # type: ignore[misc]
        pass

    module.set_processor(Other())


def lora(module: nn.Module) -> None:
    inject_adapter_in_model(LoraConfig(target_modules=["to_q"], r=4), module)
    module.bfloat16()


@pytest.mark.parametrize(
    "where", ["attn1", "attn1.to_k", "attn2", "attn2.to_q", "ffn", "ffn.net.0", "ffn.net.0.proj"]
)
@pytest.mark.parametrize("change", [hook, accelerate])
def test_norm_writes_bf16_for_what_is_watched(where: str, change: Any, launches: list[str]) -> None:
    made = Made(wan)
    given: list[Any] = []
    module = made.block.get_submodule(where)
    change(module)
    if change is hook:
        module.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    made()
    assert len(launches) == 2
    assert all(isinstance(x, Tensor) for x in given)


@pytest.mark.parametrize("where", ["attn1", "attn2"])
@pytest.mark.parametrize("change", [foreign_processor, lora])
def test_norm_writes_bf16_for_what_may_read_it(
    where: str, change: Any, launches: list[str]
) -> None:
    made = Made(wan)
    change(made.block.get_submodule(where))
    made()
    assert len(launches) == 2


def test_norm_writes_bf16_for_few_rows_and_for_a_gradient(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(wan)
    made.block(*made.args)  # with gradients, by the class
    monkeypatch.setattr(linears, "LEAST_ROWS", TOKENS + 1)
    made()
    assert not launches


def test_norm_writes_bf16_for_a_foreign_forward(launches: list[str]) -> None:
    made = Made(wan)
    plain = made.block.ffn.forward
    given: list[Any] = []

    def forward(states: Any) -> Any:
        given.append(states)
        return plain(states)

    made.block.ffn.forward = forward
    made()
    assert len(launches) == 2
    assert all(isinstance(x, Tensor) for x in given)


def test_joined_projections_take_fp8(launches: list[str]) -> None:
    made = Made(wan)
    before = made()
    made.linears.remove()
    for attention in (made.block.attn1, made.block.attn2):
        attention.fuse_projections()
    made.linears = Fp8Linears([nn.Identity(), made.block, nn.Identity()])
    made.linears.begin_forward(fp8=True, step=3)
    launches.clear()
    assert torch.equal(made()[0], before[0])
    assert len(launches) == 3


def test_rows_raise_where_a_tensor_is_read() -> None:
    rows = Fp8Rows(
        torch.zeros(2, 4, 32).to(torch.float8_e4m3fn), torch.ones(2, 4, 1), torch.bfloat16
    )
    with pytest.raises(TypeError):
        nn.Linear(32, 16)(rows)
    with pytest.raises((TypeError, AttributeError)):
        rows + rows  # type: ignore[operator]
    layer = nn.Linear(32, 16).bfloat16()
    taken = Fp8Linears([nn.Identity(), nn.ModuleList([layer]), nn.Identity()])
    taken.begin_forward(fp8=True, step=0)
    assert layer(rows).shape == (2, 4, 16)
    forward = layer.forward
    taken.remove()
    with pytest.raises(RuntimeError, match="after its run had ended"):
        forward(rows)


def test_sparsify_gives_the_same_bits_where_norms_write_fp8(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = dict(num_attention_heads=2, attention_head_dim=16, ffn_dim=48, text_dim=32)
    model = tiny.transformer(num_layers=4, **narrow).bfloat16()
    inputs = {
        name: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in tiny.forward_inputs().items()
    }
    method = SVG2(q_clusters=4, k_clusters=8, density=0.5)
    schedule = Schedule(dense_steps=0.0, dense_layers=0.0)

    def made() -> Tensor:
        with torch.no_grad(), sparsify(model, method, schedule, linears="fp8", fuse=True):
            with model.cache_context("cond", step_index=1, num_inference_steps=4):
                return model(**inputs)[0]

    found = made()
    assert len(launches) == 6  # two blocks of four
    asked = []
    monkeypatch.setattr(
        "svg_models.families.blocks.reads_fp8_rows",
        lambda *args: bool(asked.append(reads_fp8_rows(*args))),
    )
    assert torch.equal(made(), found)
    assert asked.count(True) == 6
