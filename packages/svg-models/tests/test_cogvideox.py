"""CogVideoX: what it does unlike the other families."""

from __future__ import annotations

from typing import Any

import composition
import pytest
import torch
import zoo
from diffusers import CogVideoXTransformer3DModel, FasterCacheConfig
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import FusedCogVideoXAttnProcessor2_0
from torch import Tensor
from zoo import cogvideox

from svg_attention import SVG1, SVG2, Dense, Schedule
from svg_models import sparsify
from svg_models.families.cogvideox import COGVIDEOX
from svg_models.recipes import recipe_for

pytestmark = pytest.mark.usefixtures("one_thread")
ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)
SPARSE = SVG2(q_clusters=4, k_clusters=12, top_p=0.6, first_iterations=2)
CASE = zoo.case("cogvideox 1.5 t2v")


def forward(model: Any, **changes: Any) -> Tensor:
    source = torch.Generator().manual_seed(5)
    arguments = dict(
        hidden_states=torch.randn(2, 3, 4, 8, 8, generator=source),
        encoder_hidden_states=torch.randn(2, 12, 32, generator=source),
        timestep=torch.full((2,), 500),
        return_dict=False,
    )
    with torch.no_grad(), model.cache_context("cond_uncond", step_index=0, num_inference_steps=4):
        return model(**(arguments | changes))[0]


def test_sparsify_projections_fused_before() -> None:
    pipe = CASE.build()
    pipe.transformer.fuse_qkv_projections()
    stock = CASE.run(pipe)
    with sparsify(pipe, Dense(), ALWAYS_SPARSE):
        assert torch.equal(CASE.run(pipe), stock)
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        assert not torch.equal(CASE.run(pipe), stock)
    assert run.stats().mean_density < 1.0
    processors = {type(p) for p in pipe.transformer.attn_processors.values()}
    assert processors == {FusedCogVideoXAttnProcessor2_0}
    assert torch.equal(CASE.run(pipe), stock)


def test_sparsify_projections_fused_afterwards_make_the_run_dense_and_say_so() -> None:
    reference = CASE.build()
    reference.transformer.fuse_qkv_projections()
    stock = CASE.run(reference)
    pipe = CASE.build()
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        pipe.transformer.fuse_qkv_projections()
        with pytest.warns(UserWarning, match=r"2 of 2 attention processors .* were replaced"):
            assert torch.equal(CASE.run(pipe), stock)
        assert run.stats().records == ()
        pipe.transformer.unfuse_qkv_projections()
        assert not torch.equal(CASE.run(pipe), stock)
        assert run.stats().mean_density < 1.0


def test_sparsify_the_dispatcher_has_no_say_as_in_the_stock_processor() -> None:
    model = cogvideox.transformer()
    stock = forward(model)
    with attention_backend("_native_math"), sparsify(model, Dense(), ALWAYS_SPARSE):
        assert torch.equal(forward(model), stock)


def test_sparsify_a_masked_call_stays_with_the_stock_processor() -> None:
    model = cogvideox.transformer()
    mask = torch.zeros(4, 1, 12 + 3 * 64)
    mask[..., :5] = -10.0
    changes = dict(attention_kwargs=dict(attention_mask=mask))
    stock = forward(model, **changes)
    assert not torch.equal(stock, forward(model))
    with sparsify(model, SPARSE, ALWAYS_SPARSE) as run:
        assert torch.equal(forward(model, **changes), stock)
    assert run.stats().records == ()


def test_sparsify_several_prompts() -> None:
    settings = dict(prompt=["a red circle", "the"], negative_prompt=["bad", "a"])
    pipe = CASE.build()
    stock = CASE.run(pipe, **settings)
    assert len(stock) == 2
    with sparsify(pipe, Dense(), ALWAYS_SPARSE):
        assert torch.equal(CASE.run(pipe, **settings), stock)
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE):
        assert torch.isfinite(CASE.run(pipe, **settings)).all()


@pytest.mark.parametrize(
    ("version", "frames", "expected"), [({}, 3, 3), (cogvideox.VERSION_15, 3, 2)]
)
def test_grid_counts_a_padded_frame(version: Any, frames: int, expected: int) -> None:
    model = cogvideox.transformer(**version)
    latents = torch.zeros(1, frames, 4, 8, 6)
    assert COGVIDEOX.grid(model, {"hidden_states": latents}) == (expected, 8, 6)


def test_recipe_for_gives_the_nearest_settings_and_a_note() -> None:
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(num_attention_heads=48, num_layers=42)
    recipe = recipe_for(model, 17_550)
    assert isinstance(recipe.method, SVG2)
    assert recipe.schedule == Schedule(dense_steps=0.2, dense_layers=0.025)
    assert "nearest published settings, those of CogVideoX 1.5" in recipe.note
    assert recipe_for(model, 44_880, method="svg1").method == SVG1(density=0.25)


def test_sparsify_a_cache_that_halves_the_batch() -> None:
    def config(player: composition.Player) -> FasterCacheConfig:
        return FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 850),
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(-1, 850),
            attention_weight_callback=lambda module: 0.5,
            current_timestep_callback=lambda: player.current_timestep,
            tensor_format="BFCHW",
        )

    feature = composition.Feature(
        title="FasterCache", apply=composition.caching(config), steps=6, changes=True, skips=True
    )
    assert composition.check("CogVideoX", feature).verdict == "yes"
