"""Several prompts of different length and several videos of each, in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

from svg_attention import SVG2, Dense, Schedule
from svg_models import sparsify

pytestmark = pytest.mark.usefixtures("one_thread")
ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)
SPARSE = SVG2(q_clusters=4, k_clusters=12, top_p=0.6, first_iterations=2)
CASES = (
    "wan 2.2 t2v",
    "wan 2.2 ti2v, image",
    "cosmos 1.0 t2w",
    "cosmos predict2 v2w",
    "cogvideox 1.5 t2v",
    "ltx i2v",
    "skyreels v2 t2v",
)


@pytest.mark.parametrize("name", CASES)
def test_sparsify_dense_is_stock_and_every_video_is_sparse(name: str) -> None:
    case = zoo.case(name)
    pipe = case.build()
    settings: dict[str, Any] = dict(
        prompt=["a red circle", "the blue square moving left"],
        negative_prompt=["bad", "bad quality"],
        num_videos_per_prompt=2,
    )
    stock = case.run(pipe, **settings)
    assert stock.shape[0] == (2 if case.family == "cogvideox" else 4)  # it makes one of each
    with sparsify(pipe, Dense(), ALWAYS_SPARSE):
        assert torch.equal(case.run(pipe, **settings), stock)
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        videos = case.run(pipe, **settings)
    assert torch.isfinite(videos).all()
    assert 0.1 < run.stats().mean_density < 0.95
    for video, dense in zip(videos, stock, strict=True):
        assert not torch.allclose(video, dense, rtol=1e-3, atol=1e-3)
