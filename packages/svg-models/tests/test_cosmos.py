"""Cosmos: the processor to the bit, and steps whose timesteps look alike."""

from __future__ import annotations

import pytest
import torch
import zoo
from zoo import cosmos

from svg_attention import Dense, Schedule
from svg_models import sparsify
from svg_models.families.cosmos import COSMOS, SparseCosmosProcessor
from svg_models.families.steps import project_out

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_processor_repeats_the_stock_one_to_the_bit(dtype: torch.dtype) -> None:
    model = cosmos.transformer(4).to(dtype)
    attn = model.transformer_blocks[0].attn1
    states = torch.randn(2, 192, 36, generator=torch.Generator().manual_seed(0)).to(dtype)
    rotation = model.rope(torch.zeros(1, 4, 3, 16, 16), fps=24)
    processor = SparseCosmosProcessor(attn.processor, torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        expected = attn(states, image_rotary_emb=rotation)
        query, key, values = processor.prepare(attn, states, rotation)
        out = project_out(attn, COSMOS.dense(query, key, values()))
    assert torch.equal(out, expected)


def test_rotate_halves_rotates_the_halves_of_a_head_into_each_other() -> None:
    model = cosmos.transformer(4)
    attn = model.transformer_blocks[0].attn1
    states = torch.randn(1, 192, 36, generator=torch.Generator().manual_seed(0))
    cos, sin = model.rope(torch.zeros(1, 4, 3, 16, 16), fps=24)
    processor = SparseCosmosProcessor(attn.processor, torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        plain, _, _ = processor.prepare(attn, states, None)
        turned, _, _ = processor.prepare(attn, states, (cos, sin))
    angle = torch.atan2(sin, cos)[:, None, :9]
    expected = torch.complex(plain[..., :9], plain[..., 9:]) * torch.polar(
        torch.ones_like(angle), angle
    )
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], dim=-1))


def test_sparsify_what_cosmos_transfer_adds_is_left_alone() -> None:
    settings = dict(img_context_dim_in=8, img_context_dim_out=36, controlnet_block_every_n=1)
    model = cosmos.transformer(4, extra_pos_embed_type=None, **settings)
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source)

    inputs = dict(
        hidden_states=draw(1, 4, 3, 16, 16),
        timestep=torch.tensor([0.5]),
        encoder_hidden_states=(draw(1, 12, 32), draw(1, 5, 8)),
        block_controlnet_hidden_states=[draw(1, 192, 36), draw(1, 192, 36)],
        return_dict=False,
    )
    with torch.no_grad():
        (stock,) = model(**inputs)
        with sparsify(model, Dense(), Schedule(dense_steps=0.0)) as run:
            assert [slot.path for slot in run._engine.slots] == [
                "transformer_blocks.0.attn1",
                "transformer_blocks.1.attn1",
            ]
            with pytest.warns(UserWarning, match="cannot tell the denoising step"):
                (video,) = model(**inputs)
    assert torch.equal(video, stock)


def test_sparsify_each_step_counts_once_though_timesteps_repeat_in_bf16() -> None:
    case = zoo.case("cosmos predict2 v2w")
    pipe = case.build().to(dtype=torch.bfloat16)
    seen = []
    watch = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"].flatten()[-1].item()),
        with_kwargs=True,
    )
    with sparsify(pipe, Dense(), Schedule(dense_steps=0.0)) as run:
        case.run(pipe, num_inference_steps=36)
    watch.remove()
    assert len(set(seen)) < 36
    assert [r.step for r in run.stats().records if r.layer == 0] == sorted([*range(36)] * 2)
