"""Caches of diffusers for the length of a run, and among what is tuned."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import zoo

from svg_attention import SVG2, Dense, Schedule
from svg_models import Recipe, sparsify
from svg_models.caching import Cache, can_cache, read_cache
from svg_models.errors import SettingError
from svg_models.recipe import Layers

pytestmark = pytest.mark.usefixtures("one_thread")
ALWAYS = Schedule(dense_steps=0.0, dense_layers=0.0)
SPARSE = SVG2(q_clusters=6, k_clusters=12, density=0.5, first_iterations=4, compensate=True)
STEPS = 6


def generate(pipe: Any) -> torch.Tensor:
    return tiny.generate(pipe, num_inference_steps=STEPS)


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [("first-block@0.1", "first-block", 0.1), ("taylor@2", "taylor", 2.0)],
)
def test_read_cache_reads_kind_and_amount(text: str, kind: str, amount: float) -> None:
    assert read_cache(text) == Cache(kind=kind, amount=amount)
    assert read_cache("none") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("first-blok@0.1", "did you mean 'first-block'"),
        ("first-block", "above 0, at most 1"),
        ("first-block@0", "above 0, at most 1"),
        ("first-block@nan", "above 0, at most 1"),
        ("first-block@2", "above 0, at most 1"),
        ("taylor@1", "a whole number from 2 to 10"),
        ("taylor@2.5", "a whole number from 2 to 10"),
        (0.1, "must be a text"),
        (None, "must be a text"),
    ],
)
def test_read_cache_names_what_is_wrong(text: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        read_cache(text)


@pytest.mark.parametrize("cache", ["first-block@1", "taylor@2"])
@pytest.mark.parametrize("method", [Dense(), SPARSE], ids=["dense", "sparse"])
def test_a_cache_leaves_out_blocks_and_is_gone_afterwards(cache: str, method: Any) -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, method, ALWAYS) as run:
        plain = generate(pipe)
    every = run.stats().calls
    assert every == STEPS * 2 * 3
    with sparsify(pipe, method, ALWAYS, cache=cache) as run:
        cached = generate(pipe)
        again = generate(pipe)
        assert pipe.transformer.is_cache_enabled
    assert torch.equal(cached, again)  # one video leaves nothing to the next
    assert torch.isfinite(cached).all()
    assert not torch.equal(cached, plain)
    assert run.stats().calls < every
    assert run.recipe is not None
    assert run.recipe.layers.cache == cache
    assert not pipe.transformer.is_cache_enabled
    with sparsify(pipe, method, ALWAYS):
        assert torch.equal(generate(pipe), plain)


def test_a_cache_that_never_applies_changes_nothing() -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, SPARSE, ALWAYS):
        plain = generate(pipe)
    with sparsify(pipe, SPARSE, ALWAYS, cache="first-block@0.000001") as run:
        assert torch.equal(generate(pipe), plain)
    assert run.stats().calls == STEPS * 2 * 3


def test_branches_that_read_alike_take_a_cache() -> None:
    pipe = tiny.pipeline()
    alike = SVG2(q_clusters=6, k_clusters=12, density=0.5, first_iterations=4, share_branches=True)
    with sparsify(pipe, alike, ALWAYS, cache="first-block@0.3") as run:
        assert torch.isfinite(generate(pipe)).all()
    assert run.stats().calls < STEPS * 2 * 3


def test_a_recipe_holds_its_cache() -> None:
    recipe = Recipe(method=SPARSE, schedule=ALWAYS, layers=Layers(cache="taylor@3"))
    document = recipe.to_dict()
    assert document["cache"] == "taylor@3"
    assert Recipe.from_dict(document) == recipe
    del document["cache"]
    assert Recipe.from_dict(document).layers.cache == "none"
    with pytest.raises(SettingError, match="did you mean 'taylor'"):
        Recipe.from_dict(document | {"cache": "tailor@2"})
    pipe = tiny.pipeline()
    with sparsify(pipe, recipe=recipe) as run:
        generate(pipe)
    assert run.stats().calls < STEPS * 2 * 3


def test_sparsify_refuses_a_cache_beside_another() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = tiny.pipeline()
    plain = generate(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    assert not can_cache(pipe.transformer)
    with pytest.raises(SettingError, match="has one"):
        sparsify(pipe, SPARSE, cache="taylor@2")
    assert pipe.transformer.is_cache_enabled
    pipe.transformer.disable_cache()
    assert can_cache(pipe.transformer)
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("name", ["hunyuan_video15", "cosmos", "easyanimate"])
def test_sparsify_refuses_a_cache_that_diffusers_does_not_have(name: str) -> None:
    found = next(one for one in zoo.CASES if one.name.startswith(name))
    pipe = found.build()
    assert not can_cache(pipe.transformer)
    with pytest.raises(SettingError, match=r"cache first-block@0\.1 is not for"):
        sparsify(pipe, SPARSE, cache="first-block@0.1")


def test_beside_dense_times_nothing_beside_a_cache() -> None:
    pipe = tiny.pipeline()
    with sparsify(pipe, SPARSE, ALWAYS, cache="first-block@1") as run:
        alone = generate(pipe)
        with run.beside_dense(now=lambda: 0.0, leave_out=lambda seconds: None) as pairs:
            assert torch.equal(generate(pipe), alone)
        assert pairs.steps() == ()
