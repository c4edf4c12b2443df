"""Videos that ranks make together are those of one process, in every family, dense and sparse."""

from __future__ import annotations

import copy
import json
import pickle

import processes
import pytest
import sharing
import tiny
import torch

from svg_attention import UnsupportedError
from svg_models import parallelize, sparsify
from svg_models.families import family_of
from svg_models.families.processors import original_of
from svg_models.parallel.share import Share, part_sizes
from svg_models.parallel.sharing import SharedTransformer

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


@pytest.mark.parametrize("sparse", [False, True])
def test_shared_transformer_keeps_settings_of_processors_on_the_models_own(sparse: bool) -> None:
    model = tiny.transformer()
    attn = model.blocks[0].attn1
    own = attn.processor
    run = sparsify(model) if sparse else None
    family = family_of(model)
    shared = SharedTransformer(model, family, family.sharing, Share.alone())
    assert attn.processor is not own
    assert original_of(attn.processor) is own
    model.set_attention_backend("native")
    assert own._attention_backend == attn.processor._attention_backend == "native"
    copied = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert {type(one.blocks[0].attn1.processor) for one in copied} == {type(own)}
    shared.restore()
    if run is not None:
        assert original_of(attn.processor) is attn.processor.original is own
        run.restore()
    assert attn.processor is own


@pytest.mark.parametrize("count", [0, 1, 5, 8, 1000])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_part_sizes_are_those_of_torch(count: int, parts: int) -> None:
    assert part_sizes(count, parts) == [len(x) for x in torch.arange(count).tensor_split(parts)]
