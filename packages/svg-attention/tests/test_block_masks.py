from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from svg_attention import SparsePlan, sparse_attention


def tensors(queries: int, keys: int, *, batch: int = 2, heads: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, n, 16, generator=draw) for n in (queries, keys, keys)]


@pytest.mark.parametrize(
    ("block", "queries", "keys"),
    [(128, 512, 384), (128, 500, 333), ((256, 64), 700, 250), ((32, 100), 130, 450)],
)
def test_from_block_mask_reads_the_blocks_of_the_mask(
    block: Any, queries: int, keys: int, masked_attention: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    rows, width = (block, block) if isinstance(block, int) else block
    draw = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 3, -(-queries // rows), -(-keys // width), generator=draw) < 0.5
    mask[0, 0, 0] = False
    plan = SparsePlan.from_block_mask(mask, block, query_length=queries, key_length=keys)
    pairs = mask.repeat_interleave(rows, 2).repeat_interleave(width, 3)[:, :, :queries, :keys]
    assert torch.equal(plan.to_mask(), pairs)
    data = tensors(queries, keys)
    exact, _ = masked_attention(*data, pairs)
    assert torch.allclose(sparse_attention(*data, plan).double(), exact, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (torch.ones(1, 1, 2, 2), {}, "mask must be bool"),
        (torch.ones(2, 2, dtype=torch.bool), {}, r"mask must be \[B, H, Tq, Tk\]"),
        (torch.ones(1, 1, 2, 2, dtype=torch.bool), {"block": 96}, "a divisor of 128"),
        (torch.ones(1, 1, 2, 2, dtype=torch.bool), {"query_length": 300}, "300 is 3 blocks of 128"),
    ],
)
def test_from_block_mask_refuses_what_does_not_fit(
    mask: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        SparsePlan.from_block_mask(mask, **options)


def frames(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Allow neighbouring frames of 128 tokens, and the first frame."""
    return ((q // 128 - k // 128).abs() <= h) | (k < 128)


@pytest.mark.parametrize("queries", [640, 570])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_from_flex_computes_what_flex_attention_does(queries: int) -> None:
    query, key, value = tensors(queries, 640)
    mask = create_block_mask(frames, 2, 3, queries, 640, device="cpu")
    plan = SparsePlan.from_flex(mask)
    expected = flex_attention(query, key, value, block_mask=mask)
    assert 0.3 < float(plan.density().mean()) < 0.9
    assert torch.allclose(sparse_attention(query, key, value, plan), expected, atol=1e-5)


def test_from_flex_takes_lists_of_blocks_and_one_mask_for_all_heads(
    masked_attention: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    counts = torch.tensor([[[2, 1, 3]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 2, 1], [1, 0, 2], [2, 0, 1]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128)
    data = tensors(384, 384)
    plan = SparsePlan.from_flex(mask, batch=2, heads=3)
    blocks = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]], dtype=torch.bool)
    pairs = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1).expand(2, 3, -1, -1)
    # FlexAttention without compilation knows nothing of the lists, so an oracle stands in for it.
    exact, _ = masked_attention(*data, pairs)
    assert torch.allclose(sparse_attention(*data, plan).double(), exact, atol=1e-5)


def test_from_flex_refuses_a_block_that_is_read_in_part() -> None:
    causal = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 256, 256, device="cpu")
    with pytest.raises(ValueError, match=r"allows block \(0, 0\) of item 0, head 0, in part"):
        SparsePlan.from_flex(causal)


def test_from_block_mask_and_from_flex_say_what_is_no_mask() -> None:
    for mask in (None, [[True]]):
        with pytest.raises(TypeError, match=r"mask must be a torch\.Tensor, got"):
            SparsePlan.from_block_mask(mask)
        with pytest.raises(TypeError, match="must be a BlockMask"):
            SparsePlan.from_flex(mask)
