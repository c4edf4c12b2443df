"""The Wan family: every variant of the transformer, layer by layer and whole."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from svg_attention import SVG1, SVG2, Dense, Schedule, Session
from svg_models import sparsify
from svg_models.families.steps import project_out, project_qkv, rotate_pairs, split_heads
from svg_models.families.wan import WAN, SparseWanProcessor

pytestmark = pytest.mark.usefixtures("one_thread")
ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)
SPARSE = SVG2(q_clusters=6, k_clusters=12, top_p=0.6, first_iterations=4)


def forward(model: Any, inputs: dict[str, Any], step: int = 0) -> torch.Tensor:
    with torch.no_grad(), model.cache_context("cond", step_index=step, num_inference_steps=10):
        return model(**inputs)[0]


def assert_dense_is_exact_and_sparse_differs(model: Any, inputs: dict[str, Any]) -> None:
    stock = forward(model, inputs)
    with sparsify(model, Dense(), ALWAYS_SPARSE):
        assert torch.equal(forward(model, inputs), stock)
    with sparsify(model, SPARSE, ALWAYS_SPARSE) as run:
        sparse = forward(model, inputs)
        assert run.stats().mean_density < 1.0
    assert torch.isfinite(sparse).all()
    assert not torch.allclose(sparse, stock, atol=1e-4)
    assert torch.equal(forward(model, inputs), stock)


def test_sparsify_only_the_self_attention_of_the_blocks_is_taken() -> None:
    model = tiny.transformer(num_layers=2)
    with sparsify(model, Dense()):
        taken = [
            path
            for path, module in model.named_modules()
            if isinstance(getattr(module, "processor", None), SparseWanProcessor)
        ]
        assert taken == ["blocks.0.attn1", "blocks.1.attn1"]
        assert type(model.blocks[0].attn2.processor) is WanAttnProcessor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparsify_the_shared_steps_repeat_the_stock_processor_to_the_bit(
    dtype: torch.dtype,
) -> None:
    model = tiny.transformer().to(dtype)
    attn = model.blocks[0].attn1
    states = torch.randn(2, 432, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = model.rope(torch.zeros(1, 4, *tiny.GRID))
    with torch.no_grad():
        expected = attn(states, None, None, (cos, sin))
        query, key, values = project_qkv(attn, states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (split_heads(x, attn.heads) for x in (query, key, values()))
        query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
        out = WAN.dense(query, key, value)
        assert torch.equal(project_out(attn, out.type_as(query)), expected)


def test_rotate_pairs_is_that_of_complex_numbers() -> None:
    source = torch.Generator().manual_seed(1)
    states = torch.randn(2, 5, 3, 8, generator=source)
    angles = torch.randn(1, 5, 1, 4, generator=source)
    turned = torch.view_as_complex(states.unflatten(-1, (-1, 2))) * torch.polar(
        torch.ones_like(angles), angles
    )
    twice = angles.repeat_interleave(2, dim=-1)
    torch.testing.assert_close(
        rotate_pairs(states, twice.cos(), twice.sin()), torch.view_as_real(turned).flatten(-2)
    )


def test_sparsify_fused_projections_before_and_after() -> None:
    inputs = tiny.forward_inputs()
    model = tiny.transformer()
    model.fuse_qkv_projections()
    fused = forward(model, inputs)
    assert_dense_is_exact_and_sparse_differs(model, inputs)
    other = tiny.transformer()
    with sparsify(other, Dense(), ALWAYS_SPARSE) as run:
        other.fuse_qkv_projections()
        assert torch.equal(forward(other, inputs), fused)
        other.unfuse_qkv_projections()
        assert run.messages == ()


def test_sparsify_image_to_video_keeps_the_image_in_its_cross_attention() -> None:
    model = tiny.transformer(in_channels=9, image_dim=8, added_kv_proj_dim=24)
    source = torch.Generator().manual_seed(4)
    inputs = tiny.forward_inputs() | dict(
        hidden_states=torch.randn(1, 9, *tiny.GRID, generator=source),
        encoder_hidden_states=torch.randn(1, 512, 32, generator=source),
        encoder_hidden_states_image=torch.randn(1, 257, 8, generator=source),
    )
    assert WAN.task(model) == "i2v"
    assert_dense_is_exact_and_sparse_differs(model, inputs)


def test_sparsify_timesteps_per_token() -> None:
    model = tiny.transformer()
    timestep = torch.full((1, 432), 500.0)
    timestep[:, :144] = 0.0
    assert_dense_is_exact_and_sparse_differs(model, tiny.forward_inputs() | {"timestep": timestep})


def test_sparsify_arguments_by_position() -> None:
    model, inputs = tiny.transformer(), tiny.forward_inputs()
    stock = forward(model, inputs)
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    with torch.no_grad(), sparsify(model, Dense(), ALWAYS_SPARSE) as run:
        with pytest.warns(UserWarning, match="cannot tell the denoising step"):
            (out,) = model(*(inputs[name] for name in names), return_dict=False)
        assert torch.equal(out, stock)
        assert run.stats().records[0].tokens == 432


def test_sparsify_patches_shape_the_grid() -> None:
    model = tiny.transformer(patch_size=(1, 2, 2))
    assert WAN.grid(model, {"hidden_states": torch.zeros(1, 4, 5, 12, 8)}) == (5, 6, 4)


@pytest.mark.parametrize("method", [SPARSE, SVG1(density=0.4, sampled_rows=16)])
def test_sparsify_a_sample_does_not_see_the_other_one_of_its_batch(method: Any) -> None:
    def split(part: slice) -> torch.Tensor:
        model = tiny.transformer()
        inputs = tiny.forward_inputs(batch=2)
        one = {k: v[part] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        with sparsify(model, method, ALWAYS_SPARSE):
            return forward(model, one)

    both = split(slice(0, 2))
    assert both.shape[0] == 2
    torch.testing.assert_close(both[:1], split(slice(0, 1)), rtol=1e-3, atol=1e-4)


def two_transformers() -> Any:
    return tiny.pipeline(tiny.transformer(3), tiny.transformer(4), boundary_ratio=0.9)


def test_sparsify_wan22_counts_steps_over_both_transformers() -> None:
    reference = tiny.generate(two_transformers(), num_inference_steps=6)
    pipe = two_transformers()
    with sparsify(pipe, Dense(), ALWAYS_SPARSE):
        assert torch.equal(tiny.generate(pipe, num_inference_steps=6), reference)
    with sparsify(pipe, SPARSE, Schedule(dense_steps=0.5, dense_layers=0.0)) as run:
        tiny.generate(pipe, num_inference_steps=6)
        records = run.stats().records
    steps = {
        name: sorted({record.step for record in records if record.transformer == name})
        for name in ("transformer", "transformer_2")
    }
    assert steps["transformer"] + steps["transformer_2"] == list(range(6))
    assert steps["transformer_2"]
    assert {record.step for record in records if record.method == "SVG2"} == {3, 4, 5}
    assert torch.equal(tiny.generate(pipe, num_inference_steps=6), reference)


def test_sparsify_wan22_transformers_have_their_own_memory() -> None:
    """A transformer's result must not depend on what the other one left in memory."""
    inputs = tiny.forward_inputs()
    pipe = two_transformers()
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE):
        forward(pipe.transformer, inputs, step=0)
        second = forward(pipe.transformer_2, inputs, step=1)
        third = forward(pipe.transformer_2, inputs, step=2)
    pipe = two_transformers()
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE):
        assert torch.equal(forward(pipe.transformer_2, inputs, step=1), second)
        assert torch.equal(forward(pipe.transformer_2, inputs, step=2), third)


def test_sparsify_wan22_forgets_an_expert_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    forget, forgotten = Session.forget, []

    def clip(really: bool) -> torch.Tensor:
        def spied(session: Session, transformer: str) -> None:
            forgotten.append(transformer)
            if really:
                forget(session, transformer)

        monkeypatch.setattr(Session, "forget", spied)
        pipe = two_transformers()
        with sparsify(pipe, SPARSE, ALWAYS_SPARSE):
            return tiny.generate(pipe, num_inference_steps=6)

    assert torch.equal(clip(True), clip(False))
    assert forgotten == ["transformer"] * 2, "once a clip"


def test_sparsify_wan22_with_one_transformer_missing() -> None:
    model = tiny.transformer()
    pipe = tiny.pipeline(model, None)
    pipe.register_modules(transformer=None, transformer_2=model)
    run = sparsify(pipe, Dense())
    assert [slot.transformer for slot in run._engine.slots] == ["transformer_2"] * 3
    run.restore()


def test_sparsify_several_prompts_and_several_videos_of_each() -> None:
    settings = dict(
        prompt=["a red circle", "the blue square moving left"],
        negative_prompt=["bad", "bad quality"],
        num_videos_per_prompt=2,
        num_inference_steps=2,
    )
    reference = tiny.generate(tiny.pipeline(), **settings)
    pipe = tiny.pipeline()
    with sparsify(pipe, Dense(), ALWAYS_SPARSE):
        assert torch.equal(tiny.generate(pipe, **settings), reference)
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        videos = tiny.generate(pipe, **settings)
    assert videos.shape[0] == 4
    assert torch.isfinite(videos).all()
    assert run.stats().mean_density < 1.0
