from __future__ import annotations

import pytest
import torch

from svg_attention import TokenLayout
from svg_attention.methods.budget import key_budget


@pytest.mark.parametrize(("grid", "text"), [((4, 8, 16), 0), ((5, 9, 11), 60), ((4, 8, 16), 60)])
def test_key_budget_gives_the_density_asked_for(grid: tuple[int, int, int], text: int) -> None:
    layout = TokenLayout(grid=grid, text_tokens=text)
    video, tokens = layout.video_tokens, layout.tokens
    like = torch.empty(0)
    budget = float(key_budget(layout, torch.tensor([text]), 0.5, like))
    assert budget == float(key_budget(layout, None, 0.5, like))
    pairs = 0.0
    for first in range(0, tokens, 128):
        rows = min(128, tokens - first)
        pairs += rows * (tokens if first + rows > video else budget + text)
    assert pairs / tokens**2 == pytest.approx(0.5, abs=1e-9)
    assert 0.0 <= float(key_budget(layout, torch.tensor([text]), 1e-6, like)) < 1e-3
