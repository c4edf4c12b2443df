"""Every self-attention of the published checkpoints is found, on transformers without memory."""

from __future__ import annotations

import re
from collections import Counter

import diffusers
import pytest
import torch
from checkpoints import CHECKPOINTS, Checkpoint
from torch import nn

from svg_attention import Dense
from svg_models import sparsify
from svg_models.families import family_of, known_families
from svg_models.families.processors import SparseProcessor


@pytest.fixture(params=CHECKPOINTS, ids=lambda checkpoint: checkpoint.names[0])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return request.param


def test_find_attentions_each_self_attention_is_found_and_no_other(checkpoint: Checkpoint) -> None:
    kind = getattr(diffusers, checkpoint.transformer)
    with torch.device("meta"):
        model: nn.Module = kind(**checkpoint.config)
    family = family_of(model)
    assert (family.name, family.task(model)) == (checkpoint.family, checkpoint.task)

    found = family.find_attentions(model)
    width = checkpoint.heads * checkpoint.head_dim
    assert len(found) == checkpoint.layers
    for path, attn in found:
        assert attn.heads == checkpoint.heads, path
        assert [m.out_features for m in (attn.to_q, attn.to_k, attn.to_v)] == [width] * 3, path

    run = sparsify(model, Dense())
    attentions = {p: m for p, m in model.named_modules() if hasattr(m, "processor")}
    taken = [p for p, m in attentions.items() if isinstance(m.processor, SparseProcessor)]
    assert sorted(taken) == sorted(path for path, _ in found)
    others = r"\.attn2$|^context_embedder|audio|^face_adapter"
    assert all(re.search(others, path) for path in attentions.keys() - taken)
    run.restore()
    assert not any(isinstance(m.processor, SparseProcessor) for m in attentions.values())


def test_find_attentions_the_checkpoints_of_all_families_are_here() -> None:
    listed = Counter((f.name, name) for f in known_families() for name in f.checkpoints)
    tested = Counter((c.family, name) for c in CHECKPOINTS for name in c.names)
    assert listed == tested
