"""A tiny pipeline of each family on a GPU in bf16: the promises of `test_zoo`, by the kernels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import zoo
from torch import Tensor

from svg_attention import SVG1, SVG2, Dense, Schedule
from svg_models import sparsify

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)
METHODS = {
    "SVG1": SVG1(density=0.4, sampled_rows=16),
    "SVG2": SVG2(q_clusters=4, k_clusters=12, top_p=0.6, first_iterations=2),
}
WIDE: dict[str, dict[str, Any]] = {
    "wan t2v": dict(attention_head_dim=64),
    "skyreels v2 t2v": dict(attention_head_dim=64),
    "hunyuan_video t2v": dict(attention_head_dim=128, rope_axes_dim=(16, 56, 56)),
    "hunyuan_video15 t2v": dict(attention_head_dim=64, rope_axes_dim=(16, 24, 24)),
    "cosmos predict2 v2w": dict(attention_head_dim=64),
    "cogvideox 1.5 t2v": dict(attention_head_dim=64),
    "ltx t2v": dict(attention_head_dim=64, cross_attention_dim=128),
}
"""Cases, and what gives their transformers heads as wide as those of real models."""
KERNELS = {"cogvideox 1.5 t2v": {"rope"}, "ltx t2v": set()}


@pytest.fixture(scope="module", params=WIDE)
def case(request: pytest.FixtureRequest) -> zoo.Case:
    return zoo.case(request.param)


@pytest.fixture(scope="module")
def pipe(case: zoo.Case) -> Any:
    pipe = case.build()
    small = pipe.transformer
    torch.manual_seed(3)
    wide = type(small).from_config({**small.config, **WIDE[case.name]}).eval()
    tiny.sharpen(wide)
    pipe.register_modules(transformer=wide)
    return pipe.to(DEVICE, torch.bfloat16)


@pytest.fixture(scope="module")
def stock(case: zoo.Case, pipe: Any) -> Tensor:
    """Latents of a pipeline that this package has not touched yet."""
    return case.run(pipe)


def first_call(case: zoo.Case, pipe: Any) -> tuple[dict[str, Any], Tensor]:
    """Return arguments and output of the transformer's first forward pass in a video."""
    seen: list[tuple[dict[str, Any], Tensor]] = []

    def record(module: Any, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        assert args == ()
        if not seen:
            seen.append((named, output[0].clone()))

    hook = pipe.transformer.register_forward_hook(record, with_kwargs=True)
    case.run(pipe, num_inference_steps=1)
    hook.remove()
    return seen[0]


def in_fp32(value: Any) -> Any:
    """Widen the floating-point tensors among arguments."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(in_fp32(part) for part in value)
    return value


def in_full_precision(pipe: Any, arguments: dict[str, Any]) -> Tensor:
    """Return what the transformer would answer with the same weights, computed in fp32."""
    model = copy.deepcopy(pipe.transformer).float()
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        return model(**{name: in_fp32(value) for name, value in arguments.items()})[0].double()


@pytest.mark.parametrize(
    "method",
    [Dense(), SVG2(q_clusters=4, k_clusters=12, density=1.0, first_iterations=2)],
    ids=["dense", "density 1"],
)
def test_sparsify_dense_is_stock_within_rounding(
    case: zoo.Case,
    pipe: Any,
    stock: Tensor,
    method: Any,
    launched_kernels: list[str],
    assert_accurate: Callable[..., None],
) -> None:
    arguments, plain = first_call(case, pipe)
    assert launched_kernels == []
    with sparsify(pipe, method, ALWAYS_SPARSE) as run:
        again, ours = first_call(case, pipe)
        video = case.run(pipe)
    assert run.stats().mean_density_with_dense_calls == pytest.approx(1.0)
    assert set(launched_kernels) == KERNELS.get(case.name, {"qk_norm_rope"})
    assert torch.equal(again["hidden_states"], arguments["hidden_states"])
    assert_accurate(ours, plain, in_full_precision(pipe, arguments))
    assert torch.isfinite(video).all()
    assert (video - stock).float().square().mean() < 0.01 * stock.float().square().mean()


@pytest.mark.parametrize("name", METHODS)
def test_sparsify_sparse_is_bounded_and_different_and_restored(
    case: zoo.Case, pipe: Any, stock: Tensor, name: str
) -> None:
    with sparsify(pipe, METHODS[name], ALWAYS_SPARSE) as run:
        video = case.run(pipe)
        assert run.messages == ()
    assert torch.isfinite(video).all()
    assert video.abs().max() < 4 * stock.abs().max()
    assert not torch.allclose(video, stock, rtol=1e-2, atol=1e-2)
    records = run.stats().records
    assert {record.method for record in records} == {name}
    assert len(records) == case.steps * len(case.branches) * case.layers["transformer"]
    assert 0.1 < run.stats().mean_density < 0.95
    assert torch.equal(case.run(pipe), stock)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="attention in fp8 is written for compute capability 9.0",
)
@pytest.mark.parametrize("method", [Dense(), METHODS["SVG2"]])
def test_sparsify_attention_in_fp8_is_near_bf16(case: zoo.Case, pipe: Any, method: Any) -> None:
    _, stock = first_call(case, pipe)
    found = {}
    for precision in ("bf16", "fp8"):
        given = {} if precision == "bf16" else {"attention": "fp8", "fp8_from": "start"}
        with (
            warnings.catch_warnings(),
            sparsify(pipe, method, ALWAYS_SPARSE, fuse=False, **given) as run,
        ):
            warnings.simplefilter("ignore")  # heads of 64 channels are padded
            _, found[precision] = first_call(case, pipe)
            stats = run.stats()
        calls = stats.calls if precision == "fp8" else 0
        assert stats.fp8_calls == calls
        assert {r.backend for r in stats.records if calls} <= {"cuda_fp8"}
    error = (found["fp8"] - found["bf16"]).norm() / found["bf16"].norm()
    # Behind the first layer a sparse method plans from other numbers.
    assert 0 < error < (0.2 if isinstance(method, Dense) else 0.6)
    _, again = first_call(case, pipe)
    assert torch.equal(again, stock)
