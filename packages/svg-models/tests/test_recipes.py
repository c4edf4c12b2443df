"""What a model gets when the user names no method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from diffusers import WanTransformer3DModel

from svg_attention import SVG1, SVG2, Dense, Schedule, cluster_counts
from svg_models import recipe_for, sparsify
from svg_models.families import Family, known_families
from svg_models.families.wan import WAN
from svg_models.presets import find_row
from svg_models.recipes import FEW_STEPS, SHARED, nearest

pytestmark = pytest.mark.usefixtures("one_thread")


ROUNDS = {"first_iterations": 10, "step_iterations": 1}
SMALL = {"density": 0.3, "compensate": True, **ROUNDS}


def published(**config: object) -> WanTransformer3DModel:
    """Return a transformer of the published 14B shape, without memory behind it."""
    with torch.device("meta"):
        return WanTransformer3DModel(**config)


def test_recipe_for_wan_14b_720p_gets_the_published_settings() -> None:
    recipe = recipe_for(published(num_layers=1), 75_600, num_steps=50)
    # But for the rounds of k-means: 50 would make the first sparse step twice as long.
    assert recipe.method == SVG2(q_clusters=300, k_clusters=1000, top_p=0.9, min_keep=0.1, **ROUNDS)
    assert recipe.schedule == Schedule(dense_steps=0.2, dense_layers=0.03)
    assert "wan_t2v_720p" in recipe.source
    assert recipe.note == ""


@pytest.mark.parametrize(
    ("tokens", "q_clusters", "dense_steps"), [(75_600, 300, 0.35), (32_760, 200, 0.2)]
)
def test_recipe_for_image_to_video_has_its_own_rows(
    tokens: int, q_clusters: int, dense_steps: float
) -> None:
    model = published(num_layers=1, in_channels=36)
    recipe = recipe_for(model, tokens, num_steps=40)
    assert isinstance(recipe.method, SVG2)
    assert (recipe.method.q_clusters, recipe.schedule.dense_steps) == (q_clusters, dense_steps)
    assert recipe.note == ""


def test_recipe_for_a_size_nobody_published_gets_the_nearest_row_and_a_note() -> None:
    recipe = recipe_for(published(num_layers=1), 60_000, num_steps=50)
    assert recipe.method == SVG2(q_clusters=300, k_clusters=1000, **ROUNDS)
    assert "720p" in recipe.note
    assert "60,000" in recipe.note


def test_recipe_for_fewer_tokens_than_published_are_compensated() -> None:
    recipe = recipe_for(published(num_layers=1), 32_760, num_steps=50)
    assert recipe.method == SVG2(q_clusters=300, k_clusters=1000, **SMALL)
    assert recipe.note.endswith("density 0.3 and compensation")


def test_recipe_for_a_smaller_model_of_the_published_size_is_compensated_and_told() -> None:
    small = published(num_layers=1, num_attention_heads=12)
    recipe = recipe_for(small, 75_600, num_steps=50)
    assert recipe.method == SVG2(q_clusters=300, k_clusters=1000, **SMALL)
    assert "Wan 2.1 14B" in recipe.note


def test_recipe_for_a_short_clip_gets_fewer_clusters_and_compensation() -> None:
    narrow = published(num_layers=1, num_attention_heads=6)
    recipe = recipe_for(narrow, 3_328, num_steps=50)
    assert recipe.method == SVG2(q_clusters=52, k_clusters=208, **SMALL)


@pytest.mark.parametrize("steps", [4, 8, 50, None])
def test_recipe_for_a_model_as_small_as_the_embedded_one_is_the_preset(steps: int | None) -> None:
    embedded_width = published(num_layers=1, num_attention_heads=3)
    recipe = recipe_for(embedded_width, 3_328, num_steps=steps)
    row = find_row("balanced", steps=steps or 50, tokens=3_328, width=384)
    assert row is not None
    assert isinstance(row.recipe.method, SVG2)
    assert recipe.method == replace(row.recipe.method, q_clusters=52, k_clusters=208)
    assert recipe.schedule == Schedule.sparse()
    assert recipe.source == "preset balanced"
    assert recipe.measured[0].steps == min(steps or 20, 20)


@pytest.mark.parametrize(
    ("tokens", "density"), [(75_600, 0.3), (60_000, 0.378), (32_760, 0.5), (151_200, 0.3)]
)
def test_recipe_for_svg1_keeps_its_band_as_wide_as_published(tokens: int, density: float) -> None:
    recipe = recipe_for(published(num_layers=1), tokens, method="svg1")
    assert isinstance(recipe.method, SVG1)
    assert recipe.method.density == pytest.approx(density)
    assert (recipe.note == "") is (tokens == 75_600)


@pytest.mark.parametrize("family", known_families(), ids=lambda family: family.name)
def test_nearest_finds_each_published_row_by_its_own_size(family: Family) -> None:
    for row in family.recipes:
        assert nearest(family.recipes, row.task, row.tokens) is row
        assert row.source.startswith("Sparse-VideoGen")
        assert row.width > 0


def test_nearest_prefers_rows_of_another_task_to_none() -> None:
    only = (WAN.recipes[0],)
    assert nearest(only, "i2v", 75_600) is only[0]
    assert nearest((), "t2v", 75_600) is SHARED


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(75_600, (300, 1000)), (13_312, (208, 832)), (3_328, (52, 208)), (40, (1, 2)), (1, (1, 1))],
)
def test_cluster_counts_shrink_with_the_sequence(tokens: int, expected: tuple[int, int]) -> None:
    assert cluster_counts(tokens, 300, 1000) == expected


def test_recipe_for_few_steps_stay_dense_and_say_so() -> None:
    for steps, method in ((FEW_STEPS, Dense), (FEW_STEPS + 1, SVG2)):
        recipe = recipe_for(published(num_layers=1), 75_600, num_steps=steps)
        assert type(recipe.method) is method
    assert "8 denoising steps" in recipe_for(published(num_layers=1), 75_600, num_steps=8).note


def test_recipe_for_a_single_frame_stays_dense_and_says_so() -> None:
    recipe = recipe_for(published(num_layers=1), 14_400, latent_frames=1)
    assert isinstance(recipe.method, Dense)
    assert "a single frame is an image" in recipe.note


@pytest.mark.parametrize(
    ("tokens", "heads", "sparse"),
    [(8_959, 40, False), (8_960, 40, True), (3_328, 2, True), (1_023, 2, False)],
)
def test_recipe_for_short_clips_stay_dense_where_attention_is_little_of_the_work(
    tokens: int, heads: int, sparse: bool
) -> None:
    model = published(num_layers=1, num_attention_heads=heads)
    recipe = recipe_for(model, tokens, num_steps=50)
    assert isinstance(recipe.method, SVG2) is sparse
    assert sparse or "too short" in recipe.note


def test_recipe_for_a_method_without_recipes_is_refused() -> None:
    with pytest.raises(ValueError, match="recipes are for method 'svg1' or 'svg2', got 'dense'"):
        recipe_for(tiny.transformer(), 75_600, method="dense")  # type: ignore[arg-type]


def test_recipe_for_tokens_must_be_positive() -> None:
    with pytest.raises(ValueError, match="tokens must be positive, got 0"):
        recipe_for(tiny.transformer(), 0)


def test_sparsify_without_a_method_tells_why_a_short_clip_is_dense() -> None:
    pipe = tiny.pipeline()
    reference = tiny.generate(pipe, num_inference_steps=9)
    with sparsify(pipe) as run:
        assert run.recipe is None
        with pytest.warns(UserWarning, match="432 tokens is too short"):
            video = tiny.generate(pipe, num_inference_steps=9)
    assert torch.equal(video, reference)
    assert run.stats().recipe["method"] == "Dense"
    assert len(run.messages) == 1


def test_sparsify_without_a_method_takes_the_recipe_of_the_clip() -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe) as run:
        tiny.generate(pipe, num_inference_steps=10, num_frames=29)  # 8 x 12 x 12 tokens
    assert run.recipe is not None
    assert isinstance(run.recipe.method, SVG2)
    assert (run.recipe.method.q_clusters, run.recipe.method.k_clusters) == (18, 72)
    stats = run.stats()
    assert stats.recipe["source"] == "preset balanced"
    assert stats.messages == ()
    sparse_steps = {record.step for record in stats.sparse_records}
    assert sparse_steps == set(range(10))
    assert stats.mean_density < 1.0


def test_sparsify_without_a_schedule_takes_that_of_the_recipe() -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, SVG2(q_clusters=4, k_clusters=8, first_iterations=2)) as run:
        tiny.generate(pipe, num_inference_steps=5)
    assert {record.step for record in run.stats().sparse_records} == {1, 2, 3, 4}
    assert run.messages == ()
