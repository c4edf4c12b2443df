"""A transformer inside the wrappers of trainers and servers, and in another process."""

from __future__ import annotations

import json
from typing import Any

import processes
import pytest
import spawned
import tiny
import torch
import wrappers

from svg_attention import SVG2, Schedule
from svg_models import sparsify

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    lines = processes.run_ranks("wrappers.py").splitlines()
    return dict(json.loads(line) for line in lines if line.startswith("["))


@pytest.mark.parametrize("way", wrappers.WAYS)
def test_sparsify_takes_a_wrapped_transformer(found: dict[str, Any], way: str) -> None:
    expected = {
        "dense": True,
        "sparse": True,
        "restored": True,
        "calls": ["SVG2"] * 3,
        "messages": [],
    }
    assert found[way] == [expected, expected]  # on both ranks


@pytest.mark.parametrize("wrap", [wrappers.compiled, torch.nn.DataParallel])
def test_sparsify_takes_a_model_whose_wrapper_is_gone(wrap: Any) -> None:
    model, inputs = tiny.transformer(), tiny.forward_inputs()
    with sparsify(wrap(model), "svg2", density=0.3) as run, torch.no_grad():
        with model.cache_context("cond", step_index=3, num_inference_steps=4):
            model(**inputs)
    assert run.recipe is not None
    assert run.stats().records[-1].method == "SVG2"


def test_sparsify_takes_a_transformer_whose_pipeline_is_gone() -> None:
    pipe = tiny.pipeline()
    model, inputs = pipe.transformer, tiny.forward_inputs()
    run = sparsify(pipe, "svg2", density=0.3)
    del pipe
    with torch.no_grad(), model.cache_context("cond", step_index=3, num_inference_steps=4):
        model(**inputs)
    assert run.stats().records[-1].method == "SVG2"
    run.restore()


def test_sparsify_arrives_dense_in_a_process_that_is_spawned() -> None:
    pipe = tiny.pipeline()
    stock = tiny.generate(pipe)
    method = SVG2(q_clusters=6, k_clusters=12, top_p=0.6, first_iterations=4)
    with sparsify(pipe, method, Schedule(dense_steps=0.0, dense_layers=0.0)) as run:
        sparse = tiny.generate(pipe)
        calls = len(run.stats().records)
        video, processors, again = spawned.generate_elsewhere(pipe)
        assert torch.equal(video, stock)
        assert processors == {"WanAttnProcessor"}
        assert torch.equal(again, sparse)  # the copy can be made sparse in turn
        assert len(run.stats().records) == calls
        assert torch.equal(tiny.generate(pipe), sparse)
