"""One of four ranks that make videos together in every arrangement, over gloo on the CPU.

Each check compares with the same pipeline on one process. Started by `test_teams.py`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
import zoo
from processes import join_ranks
from torch import Tensor

from svg_attention import SVG1, SVG2, Schedule, UnsupportedError
from svg_models import parallelize, sparsify
from svg_models.families import family_of, transformers_of
from svg_models.parallel.crew import Crew

SPARSE = SVG2(q_clusters=4, k_clusters=12, top_p=0.6, first_iterations=2)
FULL = replace(SPARSE, top_p=0.9999999, min_keep=1.0)
ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)
STEPS = 3


def wan(heads: int = 4) -> Any:
    return tiny.pipeline(tiny.transformer(num_attention_heads=heads, num_layers=2))


def generate(pipe: Any, **changes: Any) -> Tensor:
    return tiny.generate(pipe, num_inference_steps=STEPS, **changes)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def all_alike(latents: Tensor) -> None:
    """Check that every rank has the same video, to the last bit."""
    found = [torch.empty_like(latents) for _ in range(dist.get_world_size())]
    dist.all_gather(found, latents.contiguous())
    assert all(torch.equal(found[0], one) for one in found)


def passes(pipe: Any, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Return a video, and how many passes this rank computed for it."""
    counted: list[int] = []
    for transformer in transformers_of(pipe).values():
        block = family_of(transformer).blocks_of(transformer)[0]
        hook = block.register_forward_hook(lambda *_: counted.append(1))
    latents = run()
    hook.remove()
    return latents, len(counted)


def check_crews() -> None:
    """Ranks are counted team by team, share by share, head by head."""
    rank = dist.get_rank()
    crew = Crew.of(None, None, 1, 2, whole=False)
    assert (crew.ranks, crew.ulysses, crew.number) == (4, 2, rank // 2)
    assert (crew.team.ranks, crew.team.rank, crew.team.ring) == (2, rank % 2, None)
    assert dist.get_process_group_ranks(crew.pair) == [rank % 2, rank % 2 + 2]
    crew = Crew.of(None, 2, 2, 1, whole=False)
    assert (crew.ranks, crew.ulysses, crew.number, crew.pair) == (4, 2, 0, None)
    ring = crew.team.ring
    assert ring is not None
    assert (ring.size, ring.rank, ring.parts) == (2, rank // 2, 2)
    assert dist.get_process_group_ranks(ring.group) == [rank % 2, rank % 2 + 2]
    assert dist.get_process_group_ranks(crew.team.heads) == [rank - rank % 2, rank - rank % 2 + 1]
    mine = replace(crew.team, tokens=11)
    assert (mine.sizes, mine.of_heads.tokens) == ([3, 3, 3, 2], (6, 5)[rank // 2])
    assert ring.shares(11) == (6, 5)
    crew = Crew.of(None, 2, 1, None, whole=False)
    assert (crew.ranks, crew.pair) == (2, None), "two videos beside each other"
    for wrong in ((3, 1, 1), (2, 1, 4), (0, 1, 1), (None, 3, 1)):
        with pytest.raises(ValueError, match=r"ranks|must be"):
            Crew.of(None, *wrong, whole=False)


def check_crews_of_ranks_in_unequal_groups() -> None:
    """All make all the groups of everyone; a part of them is told what would keep it waiting."""
    rank = dist.get_rank()
    dist.new_group([0, 1])  # two ranks are in one more than the others
    crew = Crew.of(None, None, 1, 2, whole=False)
    assert dist.get_process_group_ranks(crew.pair) == [rank % 2, rank % 2 + 2]
    part = dist.new_group([0, 2])
    if rank in (0, 2):
        with pytest.raises(RuntimeError, match="only where these numbers are equal"):
            Crew.of(part, None, 1, 2, whole=False)


def check_guidance_and_ulysses() -> None:
    """Two teams of two, dense and sparse; a second video has nothing to learn."""
    pipe = wan()
    for sparse in (False, True):
        taken = [sparsify(pipe, SPARSE, ALWAYS_SPARSE)] if sparse else []
        alone = generate(pipe)
        with parallelize(pipe) as run:
            assert run.ranks == 4
            for expected in (STEPS + 1, STEPS):
                shared, count = passes(pipe, lambda: generate(pipe))
                close(shared, alone)
                all_alike(shared)
                assert count == expected
            if taken:
                stats = run.merged(taken[0].stats())
                branches = {record.branch for record in stats.records}
                assert (branches, stats.calls) == ({"cond", "uncond"}, 2 * 2 * STEPS)
                assert [r.step for r in stats.records] == sorted(r.step for r in stats.records)
            # Without guidance all four share the sequence.
            _, count = passes(pipe, lambda: generate(pipe, guidance_scale=1.0))
            assert count == STEPS
            assert all(shared.share.ranks == 4 for shared in run._shared)
        close(generate(pipe, guidance_scale=1.0), generate(pipe, guidance_scale=1.0))
        assert torch.equal(generate(pipe), alone)
        for one in taken:
            one.restore()


def check_guidance_of_few_heads() -> None:
    """Of two heads two ranks have one each; the first evaluation is computed by each team."""
    pipe = wan(heads=2)
    alone = generate(pipe)
    with parallelize(pipe) as run:
        shared = generate(pipe)
        close(shared, alone)
        all_alike(shared)
        assert all(one.share.ranks == 2 for one in run._shared)


def check_batched_guidance() -> None:
    case = zoo.case("cogvideox 1.5 i2v")
    pipe = case.build()
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE):
        alone = case.run(pipe)
        with parallelize(pipe, guidance=2):
            shared = case.run(pipe)
            close(shared, alone)
            all_alike(shared)


def ring_pipelines() -> list[tuple[Any, Callable[[Any], Tensor]]]:
    """Return pipelines without text in the sequence, with text behind it, and in front."""
    cases = [zoo.case(name) for name in ("hunyuan_video t2v", "cogvideox 1.5 t2v")]
    return [(wan(), generate), *((case.build(), case.run) for case in cases)]


def check_ring() -> None:
    """Dense in a ring is dense, and so is sparse that leaves nothing out; uneven shares, too."""
    for pipe, run in ring_pipelines():
        alone = run(pipe)
        for degrees in ({"ring": 2, "ulysses": 2}, {"ring": 4, "ulysses": 1}, {"ring": 2}):
            with parallelize(pipe, **degrees):
                shared = run(pipe)
                close(shared, alone)
                all_alike(shared)
                with sparsify(pipe, FULL, ALWAYS_SPARSE) as sparse:
                    close(run(pipe), alone)
                    assert sparse.stats().sparse_calls > 0
                with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as sparse:
                    video = run(pipe)
                    all_alike(video)
                    assert video.isfinite().all()
                    # The one tile of a rank that has text reads everything.
                    if run is generate:
                        assert not torch.equal(video, shared)
                        assert sparse.stats().mean_density < 1.0
        assert torch.equal(run(pipe), alone)


def skewed(heads: int) -> Any:
    """Return a pipeline whose later heads are less peaked, and cost more than the earlier ones."""
    pipe = wan(heads)
    factors = torch.linspace(1.2, 0.4, heads).repeat_interleave(12)
    for block in pipe.transformer.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.weight.data.mul_(factors)
    return pipe


def check_balance() -> None:
    """Heads are dealt by what they cost in the step before: the same video, in equal shares."""
    pipe, videos, imbalances = skewed(16), [], []
    method = replace(SPARSE, k_clusters=54, first_iterations=8)
    with sparsify(pipe, method, ALWAYS_SPARSE) as sparse:
        alone = generate(pipe)
        heads = sparse.stats().head_density
        assert set(sparse.stats().imbalance_by_step.values()) == {1.0}
        for balance in (False, True):
            with parallelize(pipe, guidance=1, balance=balance):
                videos.append(generate(pipe))
                all_alike(videos[-1])
                imbalances.append(sparse.stats().imbalance_by_step)
                # Whoever computes a head, its density is that of one process.
                assert np.abs(sparse.stats().head_density - heads).max() < 0.02
        close(videos[0], alone)
        close(videos[1], videos[0])
    plain, dealt = imbalances
    assert min(plain.values()) > 1.3, plain
    assert dealt[0] == pytest.approx(plain[0])
    # Costs of so few tokens change from step to step; see also the tests of svg-attention.
    assert max(dealt[step] for step in range(1, STEPS)) <= 1.1, dealt


def check_ring_refusals() -> None:
    pipe = wan()
    with parallelize(pipe, ring=2), sparsify(pipe, SVG1(), ALWAYS_SPARSE):
        with pytest.raises(UnsupportedError, match="Ulysses"):
            generate(pipe)
    with pytest.raises(UnsupportedError, match="by ring"):
        parallelize(wan(heads=2), guidance=1)
    with pytest.raises(ValueError, match="shared already"):
        with parallelize(pipe, ring=2):
            parallelize(pipe)


CHECKS = (
    check_crews,
    check_guidance_and_ulysses,
    check_guidance_of_few_heads,
    check_batched_guidance,
    check_balance,
    check_ring,
    check_ring_refusals,
    check_crews_of_ranks_in_unequal_groups,
)


def main() -> None:
    warnings.filterwarnings("ignore")
    join_ranks(seconds=90)
    for check in CHECKS if len(sys.argv) < 2 else [globals()[sys.argv[1]]]:
        check()
        print(check.__name__, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
