"""Blocks by kernels: as near to the truth as their classes, and only where they may be.

There is no GPU here, so the reference backend computes for the kernels where a test says it serves.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import svg_kernels
from svg_models.families import family_of, fused, transformers_of
from svg_models.families.blocks import HUNYUAN_VIDEO_BLOCKS, FusedForward

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = (
    "wan t2v",
    "wan 2.1 i2v",
    "wan 2.2 ti2v, text",
    "wan vace",
    "skyreels v2 t2v",
    "hunyuan_video t2v",
    "hunyuan_video15 t2v",
    "cosmos predict2 v2w",
    "cosmos predict2.5 t2w",
    "cogvideox 1.5 t2v",
    "ltx t2v",
)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> zoo.Case:
    return zoo.case(request.param)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Say that kernels serve the CPU; return the names of those that blocks launched."""
    monkeypatch.setattr(fused, "serves", lambda device: True)
    names: list[str] = []
    for name in ("layer_norm_modulate", "rms_norm", "gate_residual", "gate_residual_norm"):
        launch = getattr(svg_kernels, name)

        def call(*args: Any, _name: str = name, _launch: Any = launch, **options: Any) -> Any:
            names.append(_name)
            return _launch(*args, **options)

        monkeypatch.setattr(svg_kernels, name, call)
    return names


def install(model: nn.Module) -> list[FusedForward]:
    forwards = FusedForward.install_all(family_of(model).find_blocks(model))
    assert forwards
    return forwards


@contextmanager
def fused_pipe(pipe: Any) -> Iterator[list[FusedForward]]:
    forwards = [forward for model in transformers_of(pipe).values() for forward in install(model)]
    yield forwards
    for forward in forwards:
        forward.remove()


def modulate_visibly(pipe: Any) -> None:
    """Give modulations weights that change the result; those of a new model are near 0."""
    draw = torch.Generator().manual_seed(9)
    for model in transformers_of(pipe).values():
        for name, weight in model.named_parameters():
            if ("norm" in name and "linear" in name) or "scale_shift_table" in name:
                weight.data += 0.2 * torch.randn(weight.shape, generator=draw)


def inputs_of_blocks(pipe: Any, case: zoo.Case) -> list[tuple[nn.Module, tuple, dict, Any]]:
    """Return what each block was given and returned in one step."""
    seen: list[tuple[nn.Module, tuple, dict, Any]] = []
    hooks = [
        block.register_forward_hook(
            lambda module, args, kwargs, out: seen.append((module, args, kwargs, out)),
            with_kwargs=True,
        )
        for model in transformers_of(pipe).values()
        for block, _ in family_of(model).find_blocks(model)
    ]
    case.run(pipe, num_inference_steps=1)
    for hook in hooks:
        hook.remove()
    assert seen
    return seen


def converted(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(converted(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: converted(item, dtype) for key, item in value.items()}
    return value


def flat(out: Any) -> list[Tensor]:
    return [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    assert [x.shape for x in found] == [x.shape for x in exact]
    pairs = list(zip(found, exact, strict=True))
    off = sum((a.double() - b).square().sum() for a, b in pairs)
    return float((off / sum(b.square().sum() for _, b in pairs)).sqrt())


def test_fused_forward_is_as_near_to_fp64_as_the_class_in_bf16(
    case: zoo.Case, launches: list[str]
) -> None:
    pipe = case.build()
    modulate_visibly(pipe)
    with torch.no_grad():
        calls = inputs_of_blocks(pipe, case)
        for block, args, kwargs, _ in calls[:4]:

            def result(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
                return flat(module(*converted(args, dtype), **converted(kwargs, dtype)))  # noqa: B023

            exact = result(copy.deepcopy(block).double(), torch.float64)
            narrow = copy.deepcopy(block).bfloat16()
            plain = error(result(narrow, torch.bfloat16), exact)
            model = next(m for m in transformers_of(pipe).values() if block in list(m.modules()))
            rule = next(r for b, r in family_of(model).find_blocks(model) if b is block)
            launches.clear()
            assert FusedForward.install(narrow, rule) is not None
            ours = error(result(narrow, torch.bfloat16), exact)
            assert "gate_residual" in launches
            assert len(launches) >= 2
            assert ours <= 1.1 * plain + 1e-6, (type(block).__name__, ours, plain)


def test_fused_forward_gives_the_clip_of_the_class_in_fp32(
    case: zoo.Case, launches: list[str]
) -> None:
    pipe = case.build()
    modulate_visibly(pipe)
    before = case.run(pipe)
    with fused_pipe(pipe):
        during = case.run(pipe)
    assert launches
    launches.clear()
    torch.testing.assert_close(during, before, rtol=2e-3, atol=2e-4)
    assert torch.equal(case.run(pipe), before)
    assert not launches


def test_remove_leaves_no_attribute(case: zoo.Case, launches: list[str]) -> None:
    pipe = case.build()
    blocks = [b for m in transformers_of(pipe).values() for b, _ in family_of(m).find_blocks(m)]
    before = [dict(block.__dict__) for block in blocks]
    with fused_pipe(pipe) as forwards:
        assert all(FusedForward.at(block) in forwards for block in blocks)
    assert [dict(block.__dict__) for block in blocks] == before


def wan() -> tuple[zoo.Case, Any]:
    case = zoo.case("wan t2v")
    return case, case.build()


def test_fused_forward_leaves_a_block_with_a_hooked_norm_to_its_class(launches: list[str]) -> None:
    case, pipe = wan()
    hooked = pipe.transformer.blocks[0].norm2
    hooked.register_forward_hook(lambda module, args, out: out * 1.5)
    before = case.run(pipe)
    one = []
    with fused_pipe(pipe):
        launches.clear()
        during = case.run(pipe)
        one = list(launches)
    torch.testing.assert_close(during, before, rtol=2e-3, atol=2e-4)
    # Of two blocks one is left: a modulated norm and two sums with the norm behind each pass.
    passes = len(case.branches) * case.steps
    assert one.count("layer_norm_modulate") == passes
    assert one.count("gate_residual_norm") == 2 * passes


def test_install_within_hooks_of_torch(launches: list[str]) -> None:
    case, pipe = wan()
    block, seen = pipe.transformer.blocks[0], []
    block.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    block.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    before = case.run(pipe)
    calls = len(seen)
    with fused_pipe(pipe) as forwards:
        launches.clear()
        during = case.run(pipe)
    assert len(forwards) == 2
    assert len(seen) == 2 * calls > 0
    assert launches.count("layer_norm_modulate") == 2 * len(case.branches) * case.steps
    torch.testing.assert_close(during, before, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("first", ["hook", "fused"])
def test_install_beside_hooks_over_forward(launches: list[str], first: str) -> None:
    case, pipe = wan()
    before = case.run(pipe)
    block = pipe.transformer.blocks[0]
    if first == "hook":
        add_hook_to_module(block, ModelHook())
        with fused_pipe(pipe) as forwards:
            assert len(forwards) == 1
            torch.testing.assert_close(case.run(pipe), before, rtol=2e-3, atol=2e-4)
        assert "_hf_hook" in block.__dict__
    else:
        with fused_pipe(pipe) as forwards:
            assert len(forwards) == 2
            add_hook_to_module(block, ModelHook())
            torch.testing.assert_close(case.run(pipe), before, rtol=2e-3, atol=2e-4)
    launches.clear()
    assert torch.equal(case.run(pipe), before)
    assert not launches
    remove_hook_from_module(block)
    assert torch.equal(case.run(pipe), before)


class Around(DiffusersHook):
    """A hook of diffusers that calls what it stands over."""

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs)


def accelerate_hook(module: nn.Module) -> None:
    add_hook_to_module(module, ModelHook())
    remove_hook_from_module(module)


def diffusers_hook(module: nn.Module) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(Around(), "around")
    registry.remove_hook("around")


@pytest.mark.parametrize("visit", [accelerate_hook, diffusers_hook])
@pytest.mark.parametrize("whose", ["blocks", "norms"])
def test_install_after_hooks_over_forward(
    launches: list[str], visit: Callable[[nn.Module], None], whose: str
) -> None:
    case, pipe = wan()
    with fused_pipe(pipe):
        during = case.run(pipe)
    before, launched = case.run(pipe), list(launches)
    for block in pipe.transformer.blocks:
        norms = (block.norm1, block.norm2, block.norm3)
        for module in (block,) if whose == "blocks" else norms:
            visit(module)
    launches.clear()
    with fused_pipe(pipe) as forwards:
        assert len(forwards) == 2
        assert torch.equal(case.run(pipe), during)
    assert launches == launched
    assert torch.equal(case.run(pipe), before)


def test_fused_forward_with_lora(launches: list[str]) -> None:
    case, pipe = wan()
    torch.manual_seed(4)
    names = ["ffn.net.0.proj", "ffn.net.2", "to_q", "to_out.0"]
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    before = case.run(pipe)
    with fused_pipe(pipe):
        torch.testing.assert_close(case.run(pipe), before, rtol=2e-3, atol=2e-4)
        assert launches


def test_fused_forward_in_a_compiled_block_is_the_class(launches: list[str]) -> None:
    case, pipe = wan()
    before = case.run(pipe)
    with fused_pipe(pipe):
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        during = case.run(pipe)
    assert not launches
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-5)


def test_deepcopy_of_a_fused_block_is_its_class(launches: list[str]) -> None:
    case, pipe = wan()
    before = case.run(pipe)
    with fused_pipe(pipe):
        double = copy.deepcopy(pipe.transformer)
        pipe.transformer, own = double, pipe.transformer
        launches.clear()
        assert torch.equal(case.run(pipe), before)
        assert not launches
        pipe.transformer = own
    assert len(install(double)) == 2


def test_fused_forward_does_not_keep_its_block(launches: list[str]) -> None:
    _, pipe = wan()
    model = pipe.transformer
    install(model)
    block = weakref.ref(model.blocks[0])
    gc.collect()
    gc.disable()
    try:
        del model, pipe
        assert block() is None
    finally:
        gc.enable()


def counts(launches: list[str], case: zoo.Case) -> dict[str, float]:
    """Return how often a forward pass launched what."""
    passes = len(case.branches) * case.steps
    return {name: launches.count(name) / passes for name in sorted({*launches})}


def test_block_leaves_the_norm_of_the_next_one(launches: list[str]) -> None:
    case, pipe = wan()
    before = case.run(pipe)
    with fused_pipe(pipe) as forwards:
        during = case.run(pipe)
        first = counts(launches, case)
        with torch.inference_mode():  # nothing tells whether a tensor was written to
            launches.clear()
            apart = case.run(pipe)
        assert all(forward.beginning.wanted for forward in forwards)
    # Of two blocks: the first norm, two sums with norms in each, one between them, the last sum.
    assert first == {"layer_norm_modulate": 1, "gate_residual_norm": 5, "gate_residual": 1}
    assert counts(launches, case) == {
        "layer_norm_modulate": 2,
        "gate_residual_norm": 4,
        "gate_residual": 2,
    }
    for found in (during, apart):
        torch.testing.assert_close(found, before, rtol=2e-3, atol=2e-4)


# No factor: a layer norm would be the same.
def replaced(states: Tensor) -> Tensor:
    return states + states.roll(1, dims=-1)


def written(states: Tensor) -> Tensor:
    return states.add_(states.roll(1, dims=-1))


class Between(nn.Module):
    """Change what one block returns before the next one gets it."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, states: Tensor, *_: Any) -> Tensor:
        return self.change(states)


@pytest.mark.parametrize("change", [replaced, written])
def test_norm_of_states_that_have_changed_is_not_taken(
    change: Callable[[Tensor], Tensor], launches: list[str]
) -> None:
    case, pipe = wan()
    first, second = pipe.transformer.blocks
    pipe.transformer.blocks = nn.ModuleList([first, Between(change), second])
    before = case.run(pipe)
    with fused_pipe(pipe) as forwards:
        during = case.run(pipe)
        assert not forwards[1].beginning.wanted
        launches.clear()
        again = case.run(pipe)
    # What was in vain once is not done again.
    assert counts(launches, case)["gate_residual"] == 2
    for found in (during, again):
        torch.testing.assert_close(found, before, rtol=2e-3, atol=2e-4)


def test_block_with_a_hook_leaves_nothing(launches: list[str]) -> None:
    case, pipe = wan()
    first = pipe.transformer.blocks[0]

    def write(module: nn.Module, args: Any, out: Tensor) -> None:
        written(out.data)  # what torch does not count as a change

    first.register_forward_hook(write)
    before = case.run(pipe)
    with fused_pipe(pipe):
        during = case.run(pipe)
    assert counts(launches, case)["gate_residual"] == 2
    torch.testing.assert_close(during, before, rtol=2e-3, atol=2e-4)


def hooked_block(block: nn.Module) -> None:
    block.register_forward_pre_hook(lambda module, args: (replaced(args[0]), *args[1:]))


def hooked_norm(block: Any) -> None:
    block.norm3.register_forward_hook(lambda module, args, out: out * 1.5)


def compiled(block: nn.Module) -> None:
    block.compile(backend="eager")


@pytest.mark.parametrize("change", [hooked_block, hooked_norm, compiled])
def test_nothing_is_left_for_a_block_that_may_begin_otherwise(
    change: Callable[[nn.Module], None], launches: list[str]
) -> None:
    case, pipe = wan()
    change(pipe.transformer.blocks[1])
    before = case.run(pipe)
    with fused_pipe(pipe) as forwards:
        during = case.run(pipe)
        assert forwards[1].beginning._left is None
    assert counts(launches, case)["gate_residual"] >= 1
    torch.testing.assert_close(during, before, rtol=2e-3, atol=2e-4)


def test_nothing_is_left_where_each_token_is_modulated(launches: list[str]) -> None:
    case = zoo.case("wan 2.2 ti2v, text")
    pipe = case.build()
    with fused_pipe(pipe):
        case.run(pipe)
    assert counts(launches, case) == {
        "layer_norm_modulate": 2,
        "gate_residual_norm": 4,
        "gate_residual": 2,
    }


def test_nothing_is_left_where_modulation_counts_no_changes(launches: list[str]) -> None:
    _, pipe = wan()
    first, second = pipe.transformer.blocks
    width = first.scale_shift_table.shape[2]
    with torch.inference_mode():
        temb = torch.randn(1, 6, width)
    install(pipe.transformer)
    with torch.no_grad():
        first(torch.randn(1, 5, width), torch.randn(1, 3, width), temb, None)
    assert FusedForward.at(second).beginning._left is None


class Bringing(nn.Module):
    """A block whose own weights are somewhere else until it is called."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block, self.table = block, block.scale_shift_table
        block.scale_shift_table = nn.Parameter(self.table.to("meta"), requires_grad=False)

    def forward(self, *args: Any) -> Any:
        self.block.scale_shift_table = self.table
        return self.block(*args)


def test_nothing_is_left_for_a_block_whose_weights_come_with_its_call(launches: list[str]) -> None:
    case, pipe = wan()
    before = case.run(pipe)
    blocks = pipe.transformer.blocks
    blocks[1] = Bringing(blocks[1])
    with fused_pipe(pipe):
        during = case.run(pipe)
    torch.testing.assert_close(during, before, rtol=2e-3, atol=2e-4)


def test_norm_that_was_left_does_not_outlive_the_run(launches: list[str]) -> None:
    case, pipe = wan()
    second = pipe.transformer.blocks[1]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    forwards = install(pipe.transformer)
    handle = second.attn1.register_forward_pre_hook(stop)  # it has been taken
    with pytest.raises(KeyboardInterrupt):
        case.run(pipe)
    handle.remove()
    plain, second.forward = second.forward, lambda *args: stop()
    with pytest.raises(KeyboardInterrupt):
        case.run(pipe)
    second.forward = plain
    assert all(forward.beginning._left is None for forward in forwards)
    forwards[1].beginning.leave(torch.ones(1), torch.ones(1), torch.ones(1))
    for forward in forwards:
        forward.remove()
    assert forwards[1].beginning._left is None
    assert forwards[0]._next is None


def with_hook(block: Any) -> None:
    block.proj_out.register_forward_hook(lambda module, args, out: out)


def with_lora(block: Any) -> None:
    torch.manual_seed(4)
    config = LoraConfig(r=2, target_modules=["proj_mlp"], init_lora_weights=False)
    inject_adapter_in_model(config, block)


def with_another_activation(block: Any) -> None:
    block.act_mlp = nn.SiLU()


@pytest.mark.parametrize("change", [None, with_hook, with_lora, with_another_activation])
@pytest.mark.parametrize("inference", [False, True])
def test_single_stream_block_is_near_fp64_whether_or_not_its_weights_may_be_read(
    change: Callable[[Any], None] | None,
    inference: bool,
    launches: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = zoo.case("hunyuan_video t2v")
    pipe = case.build()
    modulate_visibly(pipe)
    with torch.inference_mode() if inference else torch.no_grad():
        calls = [c for c in inputs_of_blocks(pipe, case) if "Single" in type(c[0]).__name__]
        block, args, kwargs, _ = calls[0]
        block = copy.deepcopy(block)
        if change is not None:
            change(block)
        wide = copy.deepcopy(block).double()
        exact = flat(wide(*converted(args, torch.float64), **converted(kwargs, torch.float64)))
        narrow = block.bfloat16()
        args, kwargs = converted(args, torch.bfloat16), converted(kwargs, torch.bfloat16)
        stock = error(flat(narrow(*args, **kwargs)), exact)
        rule = next(r for r in HUNYUAN_VIDEO_BLOCKS if type(narrow).__name__ in r.blocks)
        assert FusedForward.install(narrow, rule) is not None
        shapes: list[torch.Size] = []
        product = torch.addmm

        def addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
            shapes.append(weight.shape)
            return product(bias, x, weight)

        monkeypatch.setattr(torch, "addmm", addmm)
        assert error(flat(narrow(*args, **kwargs)), exact) <= 1.1 * stock
        width = args[0].shape[2] if args else kwargs["hidden_states"].shape[2]
        assert shapes == ([(width, width)] if change is None else [])
