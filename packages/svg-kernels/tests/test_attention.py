from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_oracles import (
    OUTPUT_LAYOUTS,
    assert_spoiled_alike,
    brute_force,
    output_layout,
    permutations,
    random_call,
    random_runs,
    runs_of_blocks,
    spoil,
)

import svg_kernels
from svg_kernels import UnsupportedError, block_sparse_attention


@pytest.mark.parametrize(
    "shape",
    [
        {"queries": 1, "keys": 1, "runs": 1},
        {"queries": 129, "keys": 63, "runs": 40, "ordered": True},
        {"queries": 200, "keys": 90, "key_heads": 1, "summaries": 3},
        {"queries": 130, "keys": 65, "batch": 2, "dim": 20, "summaries": 70, "ordered": True},
    ],
    ids=str,
)
def test_block_sparse_attention_lists_the_keys_of_every_query(shape, generator):
    arguments, keywords = random_call(generator, **shape)
    out, lse = block_sparse_attention(*arguments, return_lse=True, **keywords)
    want, want_lse = brute_force(*arguments, **keywords)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def test_block_sparse_attention_of_a_full_list_is_dense(generator):
    (query, key, value, starts, lengths), _ = random_call(generator, runs=1, key_heads=1)
    starts.zero_()
    lengths.fill_(key.shape[2])
    got = block_sparse_attention(query, key, value, starts, lengths, scale=0.3)
    want = F.scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_block_sparse_attention_gives_zero_where_a_tile_reads_nothing(generator):
    (query, key, value, starts, lengths), _ = random_call(generator, queries=300)
    lengths[0, 1, 2] = 0
    out, lse = block_sparse_attention(query, key, value, starts, lengths, return_lse=True)
    assert (out[0, 1, 256:] == 0).all()
    assert (lse[0, 1, 256:] == -torch.inf).all()


def test_block_sparse_attention_without_runs_attends_to_the_summary(generator):
    (query, key, value, _, _), keywords = random_call(generator, summaries=9)
    keys, values, weights = keywords["summary"]
    empty = torch.zeros(1, 2, 2, 0, dtype=torch.int32)
    got = block_sparse_attention(
        query, key, value, empty, empty, summary=(keys, values, torch.zeros_like(weights))
    )
    want = F.scaled_dot_product_attention(query, keys, values)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_block_sparse_attention_counts_every_key_once(generator):
    # With one-hot values and equal logits the output lists which keys were read, each with the
    # same weight; a key read twice would weigh double, one skipped nothing.
    keys = 64
    starts, lengths = random_runs((1, 1, 3), keys, 6, generator)
    query = torch.zeros(1, 1, 300, keys)
    key, value = torch.zeros(1, 1, keys, keys), torch.eye(keys)[None, None]
    out = block_sparse_attention(query, key, value, starts, lengths)
    for tile in range(3):
        read = torch.zeros(keys)
        for start, length in zip(starts[0, 0, tile], lengths[0, 0, tile], strict=True):
            read[start : start + length] += 1
        assert read.max() <= 1
        torch.testing.assert_close(
            out[0, 0, tile * 128], read / read.sum().clamp(min=1), rtol=1e-6, atol=1e-6
        )


def test_block_sparse_attention_of_blocks_of_awkward_sizes(generator):
    sizes = [0, 1, 63, 64, 65, 130, 0, 7]
    kept = torch.rand(1, 2, 2, len(sizes), generator=generator) < 0.5
    kept[..., 1] = True
    starts, lengths = runs_of_blocks(sizes, kept)
    (query, key, value, _, _), _ = random_call(generator, keys=sum(sizes))
    block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    mask = kept[..., block].repeat_interleave(128, dim=2)[:, :, : query.shape[2]]
    got = block_sparse_attention(query, key, value, starts, lengths)
    want = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_block_sparse_attention_of_a_batch_is_that_of_its_elements(generator):
    arguments, keywords = random_call(generator, batch=2, summaries=4)
    both = block_sparse_attention(*arguments, **keywords)
    for b in range(2):
        own = [x[b : b + 1] for x in arguments]
        summary = tuple(x[b : b + 1] for x in keywords["summary"])
        torch.testing.assert_close(block_sparse_attention(*own, summary=summary), both[b : b + 1])


def test_block_sparse_attention_scatters_rows_through_the_query_order(generator):
    (query, key, value, starts, lengths), _ = random_call(generator)
    order = permutations((1, 2), query.shape[2], generator)
    plain, lse = block_sparse_attention(query, key, value, starts, lengths, return_lse=True)
    scattered = svg_kernels.unpermute_rows(query, order)
    got, got_lse = block_sparse_attention(
        scattered, key, value, starts, lengths, query_order=order, return_lse=True
    )
    torch.testing.assert_close(svg_kernels.permute_rows(got, order), plain)
    torch.testing.assert_close(got_lse.gather(2, order.long()), lse)


def test_block_sparse_attention_reads_strided_inputs(generator):
    (query, key, value, starts, lengths), _ = random_call(generator)
    plain = block_sparse_attention(query, key, value, starts, lengths)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    torch.testing.assert_close(block_sparse_attention(*strided, starts, lengths), plain)


@pytest.mark.parametrize("summaries", [0, 5])
@pytest.mark.parametrize("seed", range(3))
def test_block_sparse_attention_keeps_nan_to_the_rows_that_read_it(summaries, seed):
    draw = torch.Generator().manual_seed(seed)
    arguments, keywords = random_call(
        draw, batch=2, queries=300, keys=150, runs=6, dim=16, ordered=True, summaries=summaries
    )
    spoil(arguments, keywords, draw)
    want, want_lse = brute_force(*arguments, **keywords)
    out, lse = block_sparse_attention(*arguments, return_lse=True, **keywords)
    assert_spoiled_alike(out, want, 1e-5)
    assert torch.equal(lse.isfinite(), want_lse.isfinite())


def test_block_sparse_attention_of_no_queries(generator):
    (query, key, value, starts, lengths), _ = random_call(generator)
    out, lse = block_sparse_attention(
        query[:, :, :0], key, value, starts[:, :, :0], lengths[:, :, :0], return_lse=True
    )
    assert out.shape == (1, 2, 0, 64)
    assert lse.shape == (1, 2, 0)


def test_check_operands_names_what_does_not_fit(generator):
    (query, key, value, starts, lengths), _ = random_call(generator)
    call = block_sparse_attention
    with pytest.raises(ValueError, match=r"run_starts must be \[1, 2, 2, 5\], got \[1, 2, 1, 5\]"):
        call(query, key, value, starts[:, :, :1], lengths)
    with pytest.raises(TypeError, match="run_lengths must be int32"):
        call(query, key, value, starts, lengths.long())
    with pytest.raises(TypeError, match=r"value must be torch\.float32 like query"):
        call(query, key, value.half(), starts, lengths)
    three = key.repeat(1, 2, 1, 1)[:, :3]
    with pytest.raises(ValueError, match="2 query heads are not a multiple of 3"):
        call(query, three, three, starts, lengths)
    with pytest.raises(ValueError, match="query_order must be"):
        call(query, key, value, starts, lengths, query_order=starts[..., 0])
    with pytest.raises(ValueError, match="tile_order must be"):
        call(query, key, value, starts, lengths, tile_order=starts[0, 0, 0])
    with pytest.raises(ValueError, match="scale must be a finite number above 0"):
        call(query, key, value, starts, lengths, scale=0.0)
    with pytest.raises(ValueError, match="head_dim must be 1 to 256, got 300"):
        call(*(torch.zeros(1, 2, 200, 300) for _ in range(3)), starts, lengths)
    with pytest.raises(ValueError, match="at least one row"):
        call(query, key[:, :, :0], value[:, :, :0], starts, lengths)
    with pytest.raises(ValueError, match="summary log_weights must be"):
        call(query, key, value, starts, lengths, summary=(key, value, torch.zeros(1, 2, 2, 7)))


def test_block_sparse_attention_says_why_a_backend_cannot_run(generator):
    arguments, _ = random_call(generator)
    with pytest.raises(UnsupportedError, match="CUDA device") as caught:
        block_sparse_attention(*arguments, backend="cuda")
    assert set(caught.value.reasons) == {"cuda", "triton", "reference"}
    assert caught.value.reasons["reference"] == "can run"
    with pytest.raises(ValueError, match="backend must be"):
        block_sparse_attention(*arguments, backend="cudnn")


def test_unsupported_needs_no_gpu_to_refuse_a_call():
    from svg_kernels.attention import unsupported

    cpu = torch.device("cpu")
    for name in ("cuda", "triton", "reference"):
        assert "at most 256" in unsupported(name, cpu, torch.float32, 300)
        assert "fp16, bf16 or fp32" in unsupported(name, cpu, torch.int8, 64)
    assert unsupported("reference", cpu, torch.float32, 256) is None


def test_block_sparse_attention_can_be_traced(generator):
    arguments, keywords = random_call(generator, summaries=3, ordered=True)
    keys, values, weights = keywords["summary"]
    operator = torch.ops.svg_kernels.block_sparse_attention.default
    order = keywords["query_order"], keys, values, weights, keywords["tile_order"]
    torch.library.opcheck(
        operator,
        (*arguments, *order, 0.125, True, "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.svg_kernels.block_sparse_attention_into.default,
        (*arguments, *order, 0.125, True, "reference", torch.empty_like(arguments[0])),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("layout", OUTPUT_LAYOUTS)
def test_block_sparse_attention_writes_into_any_layout(layout, generator):
    arguments, keywords = random_call(generator, batch=2, ordered=True, summaries=3)
    want, want_lse = block_sparse_attention(*arguments, return_lse=True, **keywords)
    out, whole = output_layout(layout, arguments[0])
    got, lse = block_sparse_attention(*arguments, return_lse=True, out=out, **keywords)
    assert got is out
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert whole.isnan().sum() == whole.numel() - want.numel(), "nothing else may be written"


def test_block_sparse_attention_refuses_an_output_that_does_not_fit(generator):
    arguments, keywords = random_call(generator, ordered=True)
    query = arguments[0]
    with pytest.raises(ValueError, match="the last axis of out must be contiguous"):
        block_sparse_attention(*arguments, out=query.mT.contiguous().mT, **keywords)
    with pytest.raises(ValueError, match="a place for every element"):
        block_sparse_attention(*arguments, out=query[:, :1].expand_as(query), **keywords)
    with pytest.raises(ValueError, match="like query"):
        block_sparse_attention(*arguments, out=query[:, :, 1:], **keywords)
    with pytest.raises(ValueError, match="like query"):
        block_sparse_attention(*arguments, out=query.double(), **keywords)
