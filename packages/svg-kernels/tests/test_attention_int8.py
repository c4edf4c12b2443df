from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attention_data import DATA, random_rows, relative_error
from attention_oracles import brute_force, random_call
from int8_oracles import attend_in_int8

from svg_kernels import UnsupportedError, block_sparse_attention_int8, quantize_key

# What eight digits of queries and keys cost; sharp scores multiply the error by their size.
ERRORS = {"random": 0.012, "offset": 4e-4, "skewed": 0.035, "outlier": 0.02, "sharp": 0.05}
LSE_ERRORS = {"random": 0.03, "offset": 0.03, "skewed": 0.3, "outlier": 0.05, "sharp": 0.6}
LSE_ERRORS = {"random": 0.03, "offset": 0.03, "skewed": 0.3, "outlier": 0.05, "sharp": 0.6}


def quantized(arguments):
    query, key, value, starts, lengths = arguments
    return query, quantize_key(key), value, starts, lengths


def full_plan(query, keys):
    shape = (*query.shape[:2], -(-query.shape[2] // 128), 1)
    starts = torch.zeros(shape, dtype=torch.int32, device=query.device)
    return starts, torch.full_like(starts, keys)


@pytest.mark.parametrize(
    "shape",
    [
        {"queries": 1, "keys": 9, "runs": 1},
        {"queries": 200, "keys": 90, "key_heads": 1, "summaries": 3, "ordered": True},
        {"queries": 130, "keys": 65, "batch": 2, "summaries": 70},
    ],
    ids=str,
)
def test_block_sparse_attention_int8_attends_to_what_the_integers_stand_for(shape, generator):
    arguments, keywords = random_call(generator, dim=128, **shape)
    query, rows, value, starts, lengths = quantized(arguments)
    out, lse = block_sparse_attention_int8(
        query, rows, value, starts, lengths, return_lse=True, **keywords
    )
    want, want_lse = brute_force(query, rows.dequantized(), value, starts, lengths, **keywords)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-4)


def test_block_sparse_attention_int8_writes_to_out(generator):
    arguments, keywords = random_call(generator, dim=128, ordered=True)
    arguments = quantized(arguments)
    out = torch.full_like(arguments[0], torch.nan)
    got = block_sparse_attention_int8(*arguments, out=out, **keywords)
    assert got is out
    assert torch.equal(out, block_sparse_attention_int8(*arguments, **keywords))


@pytest.mark.parametrize("name", DATA)
def test_attend_in_int8_is_as_close_as_its_digits_allow(name, generator):
    query, key, value = DATA[name](generator, 1, 256)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    out, lse = attend_in_int8(query, quantize_key(key), value, *full_plan(query, 256))
    assert relative_error(out, exact) < ERRORS[name]
    logits = query.double() @ key.double().mT * 128**-0.5
    assert (lse - torch.logsumexp(logits, -1)).abs().max() < LSE_ERRORS[name]


def test_attend_in_int8_does_not_mind_keys_far_longer_than_the_others(generator):
    # Which no query looks at: a scale for a head would leave the others two digits.
    query, key, value = random_rows(generator, 1, 256)
    key[:, :, 7] *= 100
    along = F.normalize(key[:, :, 7:8], dim=-1)
    query = query - (query @ along.mT) * along
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    out, _ = attend_in_int8(query, quantize_key(key), value, *full_plan(query, 256))
    assert relative_error(out, exact) < 0.06


def test_block_sparse_attention_int8_refuses_what_it_cannot(generator):
    arguments, _ = random_call(generator, dim=128)
    query, rows, value, starts, lengths = quantized(arguments)
    with pytest.raises(UnsupportedError, match="needs tensors on a CUDA device"):
        block_sparse_attention_int8(query, rows, value, starts, lengths, backend="cuda")
    with pytest.raises(UnsupportedError, match=r"compute capability 9\.0 alone"):
        block_sparse_attention_int8(query, rows, value, starts, lengths, backend="triton")
    with pytest.raises(TypeError, match="what quantize_key returns"):
        block_sparse_attention_int8(query, arguments[1], value, starts, lengths)
    with pytest.raises(ValueError, match="must both be"):
        block_sparse_attention_int8(query[:, :1, :, :64], rows, value, starts, lengths)
    with pytest.raises(TypeError, match="value must be"):
        block_sparse_attention_int8(query, rows, value.half(), starts, lengths)
    for wrong in (
        replace(rows, channel_scale=rows.channel_scale[..., 0]),
        replace(rows, row_scale=rows.row_scale[..., 1:]),
        replace(rows, mean=rows.mean.double()),
    ):
        with pytest.raises(ValueError, match="must be fp32"):
            block_sparse_attention_int8(query, wrong, value, starts, lengths)
    with pytest.raises(TypeError, match="keys must be int8"):
        block_sparse_attention_int8(
            query, replace(rows, key=rows.key.float()), value, starts, lengths
        )


def test_block_sparse_attention_int8_passes_the_checks_of_custom_operators(generator):
    arguments, keywords = random_call(generator, dim=128, queries=9, keys=20, ordered=True)
    query, rows, value, starts, lengths = quantized(arguments)
    key, *scales = rows.tensors
    operands = (query, key, value, starts, lengths, keywords["query_order"], None, None, None)
    for name in ("block_sparse_attention_int8", "block_sparse_attention_int8_into"):
        more = (True, "reference")
        if name.endswith("into"):
            more = (*more, torch.empty_like(query))
        torch.library.opcheck(
            getattr(torch.ops.svg_kernels, name).default, (*operands, None, 0.1, *scales, *more)
        )
