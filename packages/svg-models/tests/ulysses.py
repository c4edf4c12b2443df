"""One of two processes that share a sequence, over gloo on the CPU.

Started by `composition.ulysses_cells`, which reads the last line: the cells of all families.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import composition
import pytest
import tiny
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from processes import join_ranks
from torch import Tensor, nn

from svg_attention import SVG2, Dense, Schedule, UnsupportedError
from svg_models import parallelize, sparsify

ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)


def forward(model: nn.Module) -> Tensor:
    with torch.no_grad(), model.cache_context("cond", step_index=0, num_inference_steps=4):
        return model(**tiny.forward_inputs())[0]


def ulysses() -> None:
    alone = tiny.transformer()
    stock = forward(alone)
    full = SVG2(q_clusters=6, k_clusters=12, density=1.0, first_iterations=4)
    sparse = SVG2(q_clusters=6, k_clusters=12, top_p=0.6, first_iterations=4)

    shared = tiny.transformer()
    shared.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    parallel = forward(shared)
    with sparsify(shared, Dense(), ALWAYS_SPARSE) as run:
        assert torch.equal(forward(shared), parallel)
        assert run.stats().records[0].tokens == 432
    with sparsify(shared, full, ALWAYS_SPARSE):
        torch.testing.assert_close(forward(shared), stock, rtol=1e-3, atol=1e-4)
    with sparsify(shared, sparse, ALWAYS_SPARSE) as run:
        video = forward(shared)
        assert torch.isfinite(video).all()
        assert not torch.allclose(video, stock, atol=1e-4)
        assert run.stats().mean_density < 1.0
    assert torch.equal(forward(shared), parallel)

    late = tiny.transformer()
    with sparsify(late, Dense(), ALWAYS_SPARSE):
        late.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        assert torch.equal(forward(late), parallel)
    assert torch.equal(forward(late), parallel)


def ring() -> None:
    model = tiny.transformer()
    with sparsify(model, Dense(), ALWAYS_SPARSE):
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
        with pytest.raises(UnsupportedError, match="ulysses_degree"):
            forward(model)
    with pytest.raises(UnsupportedError, match="ulysses_degree"):
        sparsify(model, Dense())


def share(player: composition.Player) -> None:
    """Share a player's sequence."""
    parallelize(player.transformer)


def cell(family: str) -> composition.Cell:
    """Run the cell of a family."""
    return composition.check(family, composition.Feature(title="Ulysses", apply=share))


if __name__ == "__main__":
    # diffusers takes the rank modulo the number of accelerators, of which there are none here.
    torch.accelerator.device_count = lambda: 1
    join_ranks()
    ulysses()
    ring()
    cells = {family: asdict(cell(family)) for family in composition.CASES}
    if dist.get_rank() == 0:
        print(json.dumps(cells))
    dist.destroy_process_group()
