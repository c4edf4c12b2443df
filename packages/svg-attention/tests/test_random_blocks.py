from __future__ import annotations

import pytest
import torch

from svg_attention import LayerMemory, RandomBlocks, TokenLayout


@pytest.mark.parametrize("density", [0.1, 0.33, 0.7])
def test_random_blocks_meet_the_density_on_average(density: float) -> None:
    layout = TokenLayout(grid=(5, 20, 21))
    data = [torch.zeros(1, 32, layout.tokens, 8) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    plan = RandomBlocks(density=density).plan(
        *data, layout=layout, memory=LayerMemory(), generator=generator
    )
    assert plan.density().mean().item() == pytest.approx(density, abs=0.01)
    again = RandomBlocks(density=density).plan(
        *data, layout=layout, memory=LayerMemory(), generator=generator
    )
    assert not torch.equal(plan.run_starts, again.run_starts)


def test_random_blocks_refuse_a_bad_density() -> None:
    with pytest.raises(ValueError, match="density must lie"):
        RandomBlocks(density=1.1)
