"""HunyuanVideo and HunyuanVideo 1.5: text in the sequence, and padding that must not matter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor
from zoo import hunyuan_video, hunyuan_video15

from svg_attention import SVG1, SVG2, Dense, Method, Schedule, UnsupportedError
from svg_models import sparsify
from svg_models.families.hunyuan_video import HUNYUAN_VIDEO
from svg_models.families.hunyuan_video15 import HUNYUAN_VIDEO_15
from svg_models.recipes import recipe_for

pytestmark = pytest.mark.usefixtures("one_thread")
ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)
METHODS = [
    pytest.param(Dense(), id="dense"),
    pytest.param(SVG1(density=0.4, sampled_rows=16), id="SVG1"),
    pytest.param(SVG2(q_clusters=4, k_clusters=12, top_p=0.6, first_iterations=2), id="SVG2"),
]
SPARSE = SVG2(q_clusters=4, k_clusters=12, top_p=0.6, first_iterations=2)
LENGTHS = (5, 17)


def padded(lengths: tuple[int, ...], tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Return text of these lengths and its mask; sample `i` is the same in any batch."""
    text = [torch.randn(tokens, width, generator=torch.Generator().manual_seed(n)) for n in lengths]
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    return torch.stack(text), mask.long()


def inputs(lengths: tuple[int, ...]) -> dict[str, Any]:
    source = torch.Generator().manual_seed(5)
    video = torch.randn(1, 4, 3, 8, 8, generator=source).expand(len(lengths), -1, -1, -1, -1)
    text, mask = padded(lengths, 20, 16)
    return dict(
        hidden_states=video,
        timestep=torch.full((len(lengths),), 500.0),
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        pooled_projections=torch.ones(len(lengths), 8),
        return_dict=False,
    )


def inputs15(lengths: tuple[int, ...]) -> dict[str, Any]:
    source = torch.Generator().manual_seed(5)
    video = torch.randn(1, 9, 3, 8, 8, generator=source).expand(len(lengths), -1, -1, -1, -1)
    text, mask = padded(lengths, 20, 16)
    glyphs, glyph_mask = padded(tuple(n // 2 for n in lengths), 10, 32)
    return dict(
        hidden_states=video,
        timestep=torch.full((len(lengths),), 500.0),
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        encoder_hidden_states_2=glyphs,
        encoder_attention_mask_2=glyph_mask,
        image_embeds=torch.zeros(len(lengths), 3, 8),
        return_dict=False,
    )


MODELS = {
    "1.0": (lambda: hunyuan_video.transformer(guidance_embeds=False), inputs),
    "1.0 token_replace": (
        lambda: hunyuan_video.transformer(
            image_condition_type="token_replace", guidance_embeds=False
        ),
        inputs,
    ),
    "1.5": (lambda: hunyuan_video15.transformer("t2v"), inputs15),
}


def forward(model: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad(), model.cache_context("cond", step_index=0, num_inference_steps=4):
        return model(**arguments)[0]


def sparse_forward(model: Any, arguments: dict[str, Any], method: Method) -> Tensor:
    with sparsify(model, method, ALWAYS_SPARSE):
        return forward(model, arguments)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_sparsify_padding_changes_nothing(name: str, method: Method) -> None:
    build, make = MODELS[name]
    model, arguments = build(), make(LENGTHS)
    other = dict(arguments)
    for text in ("encoder_hidden_states", "encoder_hidden_states_2"):
        if text in other:
            mask = arguments[text.replace("hidden_states", "attention_mask")].bool()
            noise = 100.0 * torch.randn(other[text].shape)
            other[text] = other[text].where(mask[..., None], noise)
    video = sparse_forward(model, arguments, method)
    assert torch.equal(sparse_forward(model, other, method), video)
    longer = dict(arguments)
    mask = longer["encoder_attention_mask"].clone()
    mask[0, LENGTHS[0]] = 1
    longer["encoder_attention_mask"] = mask
    assert not torch.equal(sparse_forward(model, longer, method), video)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[::-1]])
def test_sparsify_prompts_of_different_length_equal_separate_runs(
    name: str, method: Method, lengths: tuple[int, ...]
) -> None:
    # Only the first sample of a batch draws the same random numbers as it would alone.
    build, make = MODELS[name]
    model = build()
    both = sparse_forward(model, make(lengths), method)
    alone = sparse_forward(model, make(lengths[:1]), method)
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_sparsify_dense_is_stock_with_different_lengths(name: str) -> None:
    build, make = MODELS[name]
    model, arguments = build(), make(LENGTHS)
    torch.testing.assert_close(
        sparse_forward(model, arguments, Dense()), forward(model, arguments), rtol=1e-4, atol=1e-5
    )


def test_sparsify_dual_and_single_blocks_are_layers_in_the_order_they_run() -> None:
    model = hunyuan_video.transformer(num_layers=2, num_single_layers=3, num_refiner_layers=2)
    paths = [path for path, _ in HUNYUAN_VIDEO.find_attentions(model)]
    assert paths == [
        *(f"transformer_blocks.{i}.attn" for i in range(2)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(3)),
    ]


def test_sparsify_arguments_by_position() -> None:
    model = hunyuan_video.transformer(guidance_embeds=False)
    arguments = inputs(LENGTHS[:1])
    expected = sparse_forward(model, arguments, SPARSE)
    order = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
    positional = [arguments[name] for name in order]
    rest = dict(pooled_projections=arguments["pooled_projections"], return_dict=False)
    with sparsify(model, SPARSE, ALWAYS_SPARSE), torch.no_grad():
        with model.cache_context("cond", step_index=0, num_inference_steps=4):
            assert torch.equal(model(*positional, **rest)[0], expected)


@pytest.mark.parametrize(
    ("tokens", "clusters", "dense_steps"), [(118_800, 400, 0.1), (44_550, 200, 0.04)]
)
def test_recipe_for_published_sizes_gives_their_own_settings(
    tokens: int, clusters: int, dense_steps: float
) -> None:
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel()
    recipe = recipe_for(model, tokens)
    assert recipe.method == SVG2(
        q_clusters=clusters, k_clusters=1000, first_iterations=10, step_iterations=1
    )
    assert recipe.schedule.dense_steps == dense_steps
    assert recipe.note == ""
    assert "hyvideo" in recipe.source
    assert "nearest published settings" in recipe_for(model, tokens - 1).note


def test_text_lengths_are_exact_in_bf16() -> None:
    mask = torch.zeros(2, 400, dtype=torch.bfloat16)
    mask[0, :257] = mask[1, :399] = 1
    lengths = HUNYUAN_VIDEO.text_lengths(None, {"encoder_attention_mask": mask})
    assert lengths.tolist() == [257, 399]


@pytest.mark.parametrize(("image", "expected"), [(0.0, [7, 25]), (1.0, [10, 28])])
def test_text_lengths_leave_out_an_image_of_zeros(image: float, expected: list[int]) -> None:
    arguments = inputs15(LENGTHS) | dict(image_embeds=torch.full((2, 3, 8), image))
    assert HUNYUAN_VIDEO_15.text_lengths(None, arguments).tolist() == expected


def test_sparsify_several_prompts_with_several_videos_each() -> None:
    case = zoo.case("hunyuan_video t2v")
    settings = dict(
        prompt=["a red circle", "the"], negative_prompt=["bad", "a"], num_videos_per_prompt=2
    )
    pipe = case.build()
    stock = case.run(pipe, **settings)
    assert len(stock) == 4
    with sparsify(pipe, Dense(), ALWAYS_SPARSE):
        torch.testing.assert_close(case.run(pipe, **settings), stock, rtol=1e-4, atol=1e-4)
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        video = case.run(pipe, **settings)
    assert torch.isfinite(video).all()
    assert {record.branch for record in run.stats().records} == {"cond", "uncond"}


def test_sparsify_a_distilled_model_has_one_branch() -> None:
    case = zoo.case("hunyuan_video t2v")
    pipe = case.build()
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        case.run(pipe, negative_prompt=None)
    records = run.stats().records
    assert [(r.step, r.layer) for r in records] == [(s, n) for s in range(2) for n in range(2)]
    assert {record.branch for record in records} == {"cond"}


def test_sparsify_steps_are_counted_where_timesteps_repeat_in_bf16() -> None:
    case = zoo.case("hunyuan_video t2v")
    pipe = case.build()
    pipe.transformer.to(torch.bfloat16)
    seen = []
    pipe.transformer.time_text_embed.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0].to(torch.bfloat16).item())
    )
    with sparsify(pipe, Dense(), ALWAYS_SPARSE) as run:
        case.run(pipe, num_inference_steps=50, negative_prompt=None)
    assert len(set(seen)) < len(seen) == 50
    assert [r.step for r in run.stats().records if r.layer == 0] == list(range(50))


@pytest.mark.parametrize("late", [False, True])
def test_sparsify_context_parallelism_is_refused(late: bool) -> None:
    model = hunyuan_video.transformer(guidance_embeds=False)
    parallel = SimpleNamespace(
        context_parallel_config=SimpleNamespace(ring_degree=1, ulysses_degree=2)
    )
    if late:
        with sparsify(model, Dense(), ALWAYS_SPARSE):
            model._parallel_config = parallel
            with pytest.raises(UnsupportedError, match="text and video in one sequence"):
                forward(model, inputs(LENGTHS))
    else:
        model._parallel_config = parallel
        with pytest.raises(UnsupportedError, match="text and video in one sequence"):
            sparsify(model, Dense())
