"""Videos that ranks make together are those of one process, in every family, dense and sparse."""

from __future__ import annotations

import json

import processes
import pytest
import sharing
import tiny
import torch

from svg_attention import UnsupportedError
from svg_models import parallelize
from svg_models.parallel.share import part_sizes

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without distributed"
)


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What four processes, started once, say of each check; nothing where all is right."""
    lines = processes.run_ranks("sharing/member.py", 4, seconds=900).splitlines()
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize("name", sharing.NAMES)
def test_parallelize_makes_the_video_of_one_process(said: dict[str, str], name: str) -> None:
    assert said[name] == ""


def test_parallelize_without_a_group_says_what_to_start() -> None:
    with pytest.raises(UnsupportedError, match="torchrun"):
        parallelize(tiny.transformer())


def test_parallelize_on_one_rank_changes_nothing() -> None:
    model = tiny.transformer()
    before = model.blocks[0].attn1.processor
    with parallelize(model, ulysses=1) as run:
        assert run.ranks == 1
        assert model.blocks[0].attn1.processor is before


@pytest.mark.parametrize("count", [0, 1, 5, 8, 1000])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_part_sizes_are_those_of_torch(count: int, parts: int) -> None:
    assert part_sizes(count, parts) == [len(x) for x in torch.arange(count).tensor_split(parts)]
