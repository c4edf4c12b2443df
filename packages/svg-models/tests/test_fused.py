"""Norm and rotation by one kernel: as near to the truth as the modules, and only where it may.

There is no GPU here, so its reference tier computes for the kernel where a test says it serves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import composition
import pytest
import tiny
import torch
import torch.nn.functional as F
import zoo
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import hooks
from diffusers.hooks import HookRegistry
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

import svg_kernels
from svg_attention import Dense, Schedule
from svg_models import sparsify
from svg_models.families import cogvideox, cosmos, fused, hunyuan_video, steps, wan
from svg_models.families.blocks import FusedForward
from svg_models.families.steps import ACROSS_HEADS, PER_HEAD, PER_HEAD_IN_HALVES, join, make_heads

pytestmark = pytest.mark.usefixtures("one_thread")
ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)
LAUNCHES = {
    "wan t2v": ["qk_norm_rope"],
    "wan 2.1 i2v": ["qk_norm_rope"],
    "skyreels v2 t2v": ["qk_norm_rope"],
    "hunyuan_video t2v": ["qk_norm_rope"],
    "hunyuan_video15 t2v": ["qk_norm_rope"],
    "cosmos predict2 v2w": ["qk_norm_rope"],
    "cogvideox 1.5 t2v": ["rope"],
    "cogvideox 1.0 t2v": [],  # has no rotation, and norms that are centred
}
"""Kernels that make the heads of one call, by case."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, launched_kernels: list[str]) -> list[str]:
    """Let kernels serve the CPU; return the names of those that were launched.

    The kernels between the products of a block, which round elsewhere, have tests of their own.
    """
    monkeypatch.setattr(fused, "serves", lambda device: True)
    monkeypatch.setattr(FusedForward, "install", lambda block, rule: None)
    return launched_kernels


@pytest.fixture(params=LAUNCHES)
def case(request: pytest.FixtureRequest) -> zoo.Case:
    return zoo.case(request.param)


@pytest.fixture
def calls(case: zoo.Case, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict]]:
    """Return the arguments of `make_heads` in one step of a dense run."""
    seen: list[tuple[tuple, dict]] = []

    def spy(*args: Any, **options: Any) -> Any:
        seen.append((args, options))
        return make_heads(*args, **options)

    with monkeypatch.context() as patch:
        for module in (wan, hunyuan_video, steps, cosmos, cogvideox):
            patch.setattr(module, "make_heads", spy)
        pipe = case.build()
        with sparsify(pipe, Dense(), ALWAYS_SPARSE):
            case.run(pipe, num_inference_steps=1)
    assert len(seen) >= max(case.layers.values())
    return seen


def in_fp64(
    rule: Any,
    heads: int,
    norms: tuple[Any, Any],
    projected: tuple[Tensor, ...],
    rotation: tuple[Tensor, Tensor] | None,
    *,
    text_before: int = 0,
    text_after: int = 0,
) -> list[Tensor]:
    """Make queries and keys by the formulas; pairs of channels are complex numbers."""
    made = []
    for norm, states in zip(norms, projected, strict=False):
        x = states.double() if rule.across_heads else states.double().unflatten(2, (heads, -1))
        if isinstance(norm, nn.LayerNorm):
            x = F.layer_norm(x, x.shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps)
        else:
            x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
        x = x.reshape(*x.shape[:2], heads, -1)
        if rotation is not None:
            cos, sin = (t.double().reshape(-1, 1, t.shape[-1]) for t in rotation)
            half, pairs = rule.pairing == "half", x.shape[-1] // 2
            video = x[:, text_before : x.shape[1] - text_after]
            a, b = video.chunk(2, -1) if half else (video[..., 0::2], video[..., 1::2])
            angles = torch.complex(cos, sin)
            turned = torch.complex(a, b) * (angles[..., :pairs] if half else angles[..., 0::2])
            turned = torch.view_as_real(turned)
            video.copy_((turned.mT if half else turned).flatten(-2))
        made.append(x)
    return made


def make(call: tuple[tuple, dict], dtype: torch.dtype, serve: bool) -> tuple[Tensor, ...]:
    (rule, heads, norms, projected, rotation), options = call
    norms = copy.deepcopy(norms)
    *pair, value = projected
    projected = *(x.to(dtype) for x in pair), lambda: value().to(dtype)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(fused, "serves", lambda device: serve)
        for norm in norms:
            norm.to(dtype)
        query, key, values = make_heads(rule, heads, norms, projected, rotation, **options)
        return query, key, values()


def test_make_heads_fused_heads_equal_those_of_the_modules(
    case: zoo.Case, calls: list, launches: list[str]
) -> None:
    for call in calls:
        launches.clear()
        heads = make(call, torch.float32, True)
        rotated = call[0][-1] is not None
        assert launches == [name for name in LAUNCHES[case.name] if rotated or name != "rope"]
        for found, stock in zip(heads, make(call, torch.float32, False), strict=True):
            torch.testing.assert_close(found, stock, rtol=1e-6, atol=1e-6)
        if launches:  # laid out by head, as k-means reads them fastest
            assert all(states.transpose(1, 2).is_contiguous() for states in heads[:2])


def test_join_keeps_the_memory_order_of_the_video() -> None:
    by_token = torch.randn(2, 7, 3, 8), torch.randn(2, 4, 3, 8)
    by_head = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in by_token)
    whole = torch.cat(by_token, dim=1)
    for video, text in ((by_token[0], by_head[1]), (by_head[0], by_token[1])):
        joined = join(video, text)
        assert torch.equal(joined, whole)
        assert joined.is_contiguous() == video.is_contiguous()
        assert joined.transpose(1, 2).is_contiguous() != video.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_make_heads_fused_heads_are_no_farther_from_the_truth(
    calls: list, dtype: torch.dtype, launches: list[str]
) -> None:
    for (rule, heads, norms, projected, rotation), options in calls:
        call = ((rule, heads, norms, projected, rotation), options)
        found, stock = make(call, dtype, True)[:2], make(call, dtype, False)[:2]
        rounded = tuple(x.to(dtype) for x in projected[:2])
        norms = tuple(copy.deepcopy(norm).to(dtype) for norm in norms)
        with torch.no_grad():
            truth = in_fp64(rule, heads, norms, rounded, rotation, **options)
        for one, other, exact in zip(found, stock, truth, strict=True):
            error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (one, other))
            assert error <= allowed * 1.0001
            if "qk_norm_rope" in launches:  # rounded once, so by half a unit in the last place
                half_unit = torch.finfo(dtype).eps / 2
                torch.testing.assert_close(one.double(), exact, rtol=half_unit * 1.01, atol=1e-6)


def test_make_heads_a_tiny_pipeline_of_each_family_is_the_same_video(
    case: zoo.Case, launches: list[str]
) -> None:
    pipe = case.build()
    stock = case.run(pipe)
    launches.clear()
    with sparsify(pipe, Dense(), ALWAYS_SPARSE):
        video = case.run(pipe)
    assert set(launches) == set(LAUNCHES[case.name])
    torch.testing.assert_close(video, stock, rtol=1e-5, atol=1e-5)


def norm(kind: Any = RMSNorm, size: int = 8, **options: Any) -> Any:
    module = kind(size, **({"eps": 1e-6} | options))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.5, 1.5)
    return module


def changed(change: Callable[[Any], Any], kind: Any = RMSNorm) -> dict[str, Any]:
    """Return norms of which the second was changed."""
    norms = (norm(kind), norm(kind))
    change(norms[1])
    return {"norms": norms}


def tables(tokens: int = 6, width: int = 8) -> tuple[Tensor, Tensor]:
    angle = torch.arange(tokens, dtype=torch.float32)[:, None].expand(tokens, width)
    return angle.cos(), angle.sin()


def attempt(**changes: Any) -> Any:
    """Ask for two heads of 8 channels and 6 tokens by one kernel."""
    settings: dict[str, Any] = dict(
        query=torch.ones(1, 6, 16),
        key=torch.ones(1, 6, 16),
        norms=(norm(), norm()),
        heads=2,
        rotation=tables(),
        video=slice(0, 6),
        across_heads=False,
        pairing="interleaved",
    )
    with torch.no_grad():
        return fused.norm_rope(**(settings | changes))


def put_function_over_forward(module: Any) -> None:
    module.forward = lambda x: x


def make_weight_a_plain_tensor(module: Any) -> None:
    weight = module.weight.detach()
    del module.weight
    module.weight = weight


def put_hook_of_diffusers(module: nn.Module) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hooks.ModelHook(), "any")


REFUSALS: dict[str, Callable[[], dict[str, Any]]] = {
    "forward hook": lambda: changed(lambda m: m.register_forward_hook(print)),
    "forward pre-hook": lambda: changed(lambda m: m.register_forward_pre_hook(print)),
    "hook on torch's norm": lambda: changed(lambda m: m.register_forward_hook(print), nn.RMSNorm),
    "accelerate's hook": lambda: changed(lambda m: add_hook_to_module(m, ModelHook())),
    "diffusers' hook": lambda: changed(put_hook_of_diffusers),
    "function over forward": lambda: changed(put_function_over_forward),
    "weight on another device": lambda: changed(lambda m: m.to("meta")),
    "weight of another dtype": lambda: changed(lambda m: m.to(torch.bfloat16)),
    "weight that is no parameter": lambda: changed(make_weight_a_plain_tensor),
    "weight of another size": lambda: {"norms": (norm(), norm(size=16))},
    "no weight": lambda: {"norms": (norm(), norm(elementwise_affine=False))},
    "bias": lambda: {"norms": (norm(), norm(bias=True))},
    "no norm": lambda: {"norms": (norm(), None)},
    "norm of another kind": lambda: {"norms": (norm(nn.LayerNorm), norm(nn.LayerNorm))},
    "eps left to the dtype": lambda: {"norms": (norm(nn.RMSNorm, eps=None),) * 2},
    "eps that differ": lambda: {"norms": (norm(), norm(eps=1e-5))},
    "fp64": lambda: {x: torch.ones(1, 6, 16, dtype=torch.float64) for x in ("query", "key")},
    "fewer heads of keys": lambda: {"key": torch.ones(1, 6, 8)},
    "tensor of another class": lambda: {"query": nn.Parameter(torch.ones(1, 6, 16))},
    "tables of other tokens": lambda: {"rotation": tables(5)},
    "tables of half width": lambda: {"rotation": tables(width=4)},
    "a table for each sample": lambda: {"rotation": tuple(t.expand(2, 6, 8) for t in tables())},
    "tables that differ": lambda: {"rotation": (tables()[0], tables(5)[1])},
    "complex tables": lambda: {"rotation": tuple(t.to(torch.complex64) for t in tables())},
    "tables on another device": lambda: {"rotation": tuple(t.to("meta") for t in tables())},
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_make_heads_modules_are_called_where_a_kernel_may_not_stand_for_them(
    reason: str, launches: list[str]
) -> None:
    assert attempt(**REFUSALS[reason]()) is None
    assert launches == []
    assert attempt() is not None


def test_make_heads_no_kernel_where_a_gradient_is_needed(launches: list[str]) -> None:
    attn = tiny.transformer().blocks[0].attn1
    states = torch.randn(1, 6, 24, requires_grad=True)
    projected = attn.to_q(states), attn.to_k(states), lambda: attn.to_v(states)
    norms = (attn.norm_q, attn.norm_k)
    query, _, _ = make_heads(ACROSS_HEADS, 2, norms, projected, None)
    assert launches == []
    query.sum().backward()
    assert states.grad is not None
    assert states.grad.abs().sum() > 0


@pytest.mark.parametrize("rule", [PER_HEAD, PER_HEAD_IN_HALVES])
def test_make_heads_a_hooked_norm_is_called_and_its_heads_are_rotated(
    rule: Any, launches: list[str]
) -> None:
    heard: list[Tensor] = []
    norms = (norm(), norm())
    norms[0].register_forward_hook(lambda module, args, out: heard.append(out.clone()))
    *pair, value = torch.randn(3, 2, 9, 16).unbind(0)
    projected = *pair, lambda: value
    text = dict(text_before=2, text_after=1)
    with torch.no_grad():
        query, key, values = make_heads(rule, 2, norms, projected, tables(), **text)
        assert launches == ["rope"]
        assert len(heard) == 1
        assert torch.equal(query[:, :2], heard[0][:, :2])
        assert torch.equal(query[:, -1:], heard[0][:, -1:])
        truth = in_fp64(rule, 2, norms, projected, tables(), **text)
    for found, exact in zip((query, key), truth, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(values().flatten(2), value)


def test_make_heads_queries_and_keys_rotate_together_or_not_at_all(launches: list[str]) -> None:
    query, key = torch.randn(2, 2, 6, 3, 8).unbind(0)

    def attempt(key: Tensor, video: slice = slice(0, 6)) -> Any:
        with torch.no_grad():
            return fused.rope(query, key, tables(), video, pairing="interleaved")

    for other in (key.double(), key.bfloat16(), key[:, :5], key[:1], key[..., :4], key.to("meta")):
        assert attempt(other) is None
    assert attempt(key, slice(0, 5)) is None
    assert attempt(nn.Parameter(key)) is None
    assert fused.rope(query, key, tables(), slice(0, 6), pairing="interleaved") is None
    assert launches == []
    fewer = key[:, :, :1]
    for found, states in zip(attempt(fewer), (query, fewer), strict=True):
        torch.testing.assert_close(found, PER_HEAD.rotate(states, *tables()))
    assert launches == ["rope"]


@pytest.mark.parametrize(
    ("title", "kernel"),
    [
        ("LoRA (PEFT)", "qk_norm_rope"),
        ("Fused projections", "qk_norm_rope"),
        ("Sequential CPU offload", "rope"),
        ("Group offload by block", "qk_norm_rope"),
        ("Group offload by leaf", "rope"),
        ("fp8 layerwise casting", "qk_norm_rope"),
        ("bf16 autocast", "rope"),
    ],
)
def test_make_heads_what_diffusers_does_to_a_model_still_works(
    title: str, kernel: str, launches: list[str]
) -> None:
    """The cell of the compatibility table, with kernels; hooked norms are left to themselves."""
    assert composition.QUICK[title]("Wan").verdict == "yes"
    assert set(launches) == {kernel}


@pytest.mark.parametrize(
    ("device", "installed", "auto", "expected"),
    [
        ("cpu", True, "triton", False),
        ("mps", True, "triton", False),
        ("cuda:0", False, "triton", False),
        ("cuda:0", True, "reference", False),
        ("cuda:0", True, "triton", True),
        ("cuda:0", True, "cuda", True),
    ],
)
def test_serves_takes_only_a_backend_for_gpus(
    device: str, installed: bool, auto: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def status(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(auto=auto)

    monkeypatch.setattr(svg_kernels, "status", status)
    monkeypatch.setattr(fused, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(fused, "_served", {})
    place = torch.device(device)
    assert [fused.serves(place), fused.serves(place)] == [expected, expected]
    assert asked == ([place] if place.type == "cuda" and installed else [])
