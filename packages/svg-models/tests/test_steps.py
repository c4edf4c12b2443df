"""Streams joined along the tokens: bit for bit what copies give, mostly without them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from svg_models.families import fused
from svg_models.families.hunyuan_video import text_stream
from svg_models.families.products import Projection, project_joined
from svg_models.families.steps import (
    PER_HEAD,
    Stream,
    join_streams,
    make_heads,
    make_joint_heads,
    project_qkv,
)

HEADS, DIM, VIDEO, TEXT = 3, 16, 37, 10
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Say that kernels serve the CPU; return the axes along which svg_models joined by copies."""
    monkeypatch.setattr(fused, "serves", lambda device: True)
    axes: list[int] = []
    cat = torch.cat

    def call(tensors: Any, dim: int = 0) -> Tensor:
        if sys._getframe(1).f_globals["__name__"].startswith("svg_models."):
            axes.append(dim)
        return cat(tensors, dim=dim)

    monkeypatch.setattr(torch, "cat", call)
    return axes


class DualStreamAttention(nn.Module):
    """The layers of an attention that projects text by layers of its own."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            setattr(self, name, nn.Linear(HEADS * dim, HEADS * dim))
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            norm = RMSNorm(dim, eps=1e-6)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            setattr(self, name, norm)


def streams(attn: Any, dtype: torch.dtype, batch: int = 1) -> tuple[Stream, Stream]:
    weight, draw = attn.add_k_proj.weight, torch.Generator().manual_seed(1)
    width, dim = weight.shape[1], weight.shape[1] // HEADS
    video, text = (
        torch.randn(batch, tokens, width, generator=draw).bfloat16().to(weight.device, dtype)
        for tokens in (VIDEO, TEXT)
    )
    angles = torch.randn(VIDEO, dim // 2, generator=draw).repeat_interleave(2, dim=1)
    angles = angles.to(weight.device)
    first = Stream(
        norms=(attn.norm_q, attn.norm_k),
        projected=project_qkv(attn, video),
        rotation=(angles.cos(), angles.sin()),
    )
    return first, text_stream(attn, text)


def copied(both: tuple[Stream, Stream]) -> list[Tensor]:
    """Make the heads of each stream by itself, and join them by copies."""
    parts = [make_heads(PER_HEAD, HEADS, s.norms, s.projected, s.rotation) for s in both]
    made = [(query, key, values()) for query, key, values in parts]
    return [torch.cat(pair, dim=1) for pair in zip(*made, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text_first", [False, True])
@torch.no_grad()
def test_make_joint_heads_writes_both_streams_into_one_tensor(
    dtype: torch.dtype, text_first: bool, copies: list[int]
) -> None:
    both = streams(DualStreamAttention().to(dtype), dtype)
    both = both[::-1] if text_first else both
    wanted = copied(both)
    copies.clear()
    query, key, values = make_joint_heads(PER_HEAD, HEADS, *both)
    value = values()
    assert not copies
    for found, want in zip((query, key, value), wanted, strict=True):
        assert torch.equal(found, want)
    assert query.transpose(1, 2).is_contiguous()
    assert key.transpose(1, 2).is_contiguous()


@pytest.mark.gpu
@torch.no_grad()
def test_make_joint_heads_on_a_gpu(device: torch.device) -> None:
    attn = DualStreamAttention(dim=128).to(device, torch.bfloat16)
    both = streams(attn, torch.bfloat16)
    wanted = copied(both)
    query, key, values = make_joint_heads(PER_HEAD, HEADS, *both)
    assert torch.equal(query, wanted[0])
    assert torch.equal(key, wanted[1])
    exact = copied(streams(copy.deepcopy(attn).double(), torch.float64))[2]
    error, stock = ((x.double() - exact).norm() for x in (values(), wanted[2]))
    assert error <= 1.02 * stock
    assert error < 0.01 * exact.norm()


def hook_a_norm(attn: Any) -> None:
    attn.norm_added_k.register_forward_hook(lambda module, args, out: out * 1.5)


def hook_a_layer(attn: Any) -> None:
    attn.add_v_proj.register_forward_hook(lambda module, args, out: out * 1.5)


def adapt(attn: Any) -> None:
    torch.manual_seed(4)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False), attn)
    attn.to(torch.bfloat16)


def no_norm(attn: Any) -> None:
    attn.norm_added_q = attn.norm_added_k = None


@pytest.mark.parametrize(
    ("change", "batch", "joined"),
    [
        (None, 2, [1]),
        (hook_a_layer, 1, [1]),
        (adapt, 1, [1]),
        (hook_a_norm, 1, [2, 2]),
        (no_norm, 1, [2, 2]),
    ],
)
@torch.no_grad()
def test_make_joint_heads_copies_what_is_not_the_kernel_s_or_a_plain_product(
    change: Callable[[Any], None] | None, batch: int, joined: list[int], copies: list[int]
) -> None:
    attn = DualStreamAttention().bfloat16()
    if change is not None:
        change(attn)
    both = streams(attn, torch.bfloat16, batch)
    wanted = copied(both)
    copies.clear()
    query, key, values = make_joint_heads(PER_HEAD, HEADS, *both)
    found = query, key, values()
    assert copies == joined
    assert all(torch.equal(one, want) for one, want in zip(found, wanted, strict=True))


@torch.no_grad()
def test_make_joint_heads_without_kernels_is_what_the_modules_make(
    copies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "serves", lambda device: False)
    both = streams(DualStreamAttention(), torch.float32)
    wanted = copied(both)
    copies.clear()
    query, key, values = make_joint_heads(PER_HEAD, HEADS, *both)
    found = query, key, values()
    assert copies == [1, 1, 1]
    assert all(torch.equal(one, want) for one, want in zip(found, wanted, strict=True))


@torch.no_grad()
def test_project_joined_reads_weights_as_they_are_when_it_is_called(copies: list[int]) -> None:
    layers = [nn.Linear(8, 6, dtype=torch.bfloat16) for _ in range(2)]
    states = [torch.randn(1, rows, 8).bfloat16() for rows in (5, 3)]
    projections = [Projection(layer, x) for layer, x in zip(layers, states, strict=True)]
    layers[1].weight.mul_(2)
    found = project_joined(*projections)
    assert not copies
    assert torch.equal(found[:, :5], layers[0](states[0]))
    assert torch.equal(found[:, 5:], layers[1](states[1]))


@torch.no_grad()
def test_project_joined_calls_layers_where_autocast_has_a_say(copies: list[int]) -> None:
    layers = [nn.Linear(8, 6, dtype=torch.bfloat16) for _ in range(2)]
    states = [torch.randn(1, rows, 8).bfloat16() for rows in (5, 3)]
    for dtype, joined in ((torch.bfloat16, []), (torch.float16, [1])):
        copies.clear()
        with torch.autocast("cpu", dtype):
            found = project_joined(
                *(Projection(layer, x) for layer, x in zip(layers, states, strict=True))
            )
            wanted = [layer(x) for layer, x in zip(layers, states, strict=True)]
        assert copies == joined
        assert found.dtype == dtype
        assert torch.equal(found, torch.cat(wanted, dim=1))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("inference", [False, True])
def test_join_streams_copies_only_what_is_not_one_tensor_already(
    batch: int, inference: bool
) -> None:
    with torch.inference_mode() if inference else torch.no_grad():
        both = torch.randn(batch, 7, 4)
        neighbours = (both[:, :5], both[:, 5:])
        assert join_streams(*neighbours).data_ptr() == both.data_ptr()
        assert (join_streams(*neighbours) is both) != inference
        longer = torch.randn(batch, 9, 4)
        for parts in (
            neighbours,
            (both[:, :5].clone(), both[:, 5:].clone()),
            (both[:, :5], both[:, 5:].clone()),
            (both[:, :4], both[:, 5:]),
            (both[:, 2:], both[:, :2]),
            (both[:, :5, :2], both[:, 5:, :2]),
            (both[:, :3], both[:, 3:5]),
            (longer[:, :4], longer[:, 4:8]),
        ):
            got = join_streams(*parts)
            assert torch.equal(got, torch.cat(parts, dim=1))
            assert parts is neighbours or got.data_ptr() != parts[0].data_ptr()


def test_join_streams_gives_both_parts_their_gradient() -> None:
    whole = torch.randn(1, 7, 4, requires_grad=True)
    both = whole * 1
    join_streams(both[:, :5], both[:, 5:]).sum().backward()
    assert torch.equal(whole.grad, torch.ones_like(whole))


@torch.no_grad()
def test_project_qkv_takes_neighbours_as_they_are(copies: list[int]) -> None:
    seen: list[Tensor] = []
    attn: Any = SimpleNamespace(**dict.fromkeys(("to_q", "to_k", "to_v"), lambda x: seen.append(x)))
    whole = torch.randn(1, 7, 4)
    _, _, values = project_qkv(attn, whole[:, :5], whole[:, 5:])
    values()
    assert [x is whole for x in seen] == [True] * 3
    project_qkv(attn, whole[:, 5:], whole[:, :5])
    assert copies == [1]
    assert torch.equal(seen[-1], torch.cat((whole[:, 5:], whole[:, :5]), dim=1))
