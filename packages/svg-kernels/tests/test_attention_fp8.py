from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_oracles import brute_force, random_call
from fp8_oracles import DATA, attend_in_e4m3, relative_error

from svg_kernels import (
    Fp8KeyValue,
    UnsupportedError,
    block_sparse_attention_fp8,
    quantize_key_value,
)

# What e4m3 with three digits costs: sharp scores multiply the error of a score by its size.
ERRORS = {"random": 0.07, "offset": 0.002, "skewed": 0.10, "outlier": 0.09, "sharp": 0.18}
LSE_ERRORS = {"random": 0.2, "offset": 0.2, "skewed": 1.0, "outlier": 0.4, "sharp": 2.5}


def quantized(arguments):
    query, key, value, starts, lengths = arguments
    return query, quantize_key_value(key, value), starts, lengths


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
def test_block_sparse_attention_fp8_attends_to_what_the_bytes_stand_for(shape, generator):
    arguments, keywords = random_call(generator, dim=128, **shape)
    query, rows, starts, lengths = quantized(arguments)
    out, lse = block_sparse_attention_fp8(query, rows, starts, lengths, return_lse=True, **keywords)
    want, want_lse = brute_force(query, *rows.dequantized(), starts, lengths, **keywords)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-4)


def test_block_sparse_attention_fp8_writes_to_out(generator):
    arguments, keywords = random_call(generator, dim=128, ordered=True)
    query, rows, starts, lengths = quantized(arguments)
    out = torch.full_like(query, torch.nan)
    got = block_sparse_attention_fp8(query, rows, starts, lengths, out=out, **keywords)
    assert got is out
    assert torch.equal(out, block_sparse_attention_fp8(query, rows, starts, lengths, **keywords))


@pytest.mark.parametrize("name", DATA)
def test_attend_in_e4m3_is_as_close_as_its_digits_allow(name, generator):
    query, key, value = DATA[name](generator, 1, 512)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    rows = quantize_key_value(key, value)
    out, lse = attend_in_e4m3(query, rows, *full_plan(query, 512))
    assert relative_error(out, exact) < ERRORS[name]
    logits = query.double() @ key.double().mT * 128**-0.5
    assert (lse - torch.logsumexp(logits, -1)).abs().max() < LSE_ERRORS[name]


def test_attend_in_e4m3_does_not_mind_an_offset_that_the_plain_cast_does(generator):
    query, key, value = DATA["offset"](generator, 1, 512)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())

    def cast(x):
        scale = x.abs().amax((2, 3), keepdim=True) / 448
        return (x / scale).to(torch.float8_e4m3fn).double() * scale

    plain = F.scaled_dot_product_attention(cast(query), cast(key), cast(value))
    out, _ = attend_in_e4m3(query, quantize_key_value(key, value), *full_plan(query, 512))
    assert relative_error(out, exact) < relative_error(plain, exact) / 3


def test_attend_in_e4m3_follows_scores_that_rise(generator):
    query, key, value = DATA["random"](generator, 1, 640)
    key = key * torch.linspace(0.1, 8, 640)[:, None]  # the maximum is set and raised again
    rows = quantize_key_value(key, value)
    out, _ = attend_in_e4m3(query, rows, *full_plan(query, 640))
    exact = F.scaled_dot_product_attention(
        query.double(), *(x.double() for x in rows.dequantized())
    )
    assert relative_error(out, exact) < 0.2


def test_block_sparse_attention_fp8_refuses_what_it_cannot(generator):
    arguments, _ = random_call(generator, dim=128)
    query, rows, starts, lengths = quantized(arguments)
    with pytest.raises(UnsupportedError, match="needs tensors on a CUDA device"):
        block_sparse_attention_fp8(query, rows, starts, lengths, backend="cuda")
    with pytest.raises(UnsupportedError, match=r"compute capability 9\.0 alone"):
        block_sparse_attention_fp8(query, rows, starts, lengths, backend="triton")
    with pytest.raises(TypeError, match="what quantize_key_value returns"):
        block_sparse_attention_fp8(query, arguments[1], starts, lengths)
    with pytest.raises(ValueError, match="must both be"):
        block_sparse_attention_fp8(query[:, :1, :, :64], rows, starts, lengths)
    names = ("key", "value", "key_scale", "key_mean", "value_scale", "value_mean")
    tensors = dict(zip(names, rows.tensors, strict=True))
    wrong = Fp8KeyValue(**tensors | {"key_scale": rows.key_scale[..., 0]})
    with pytest.raises(ValueError, match="scales and means must be fp32"):
        block_sparse_attention_fp8(query, wrong, starts, lengths)
    wrong = Fp8KeyValue(**tensors | {"key": rows.key.float()})
    with pytest.raises(TypeError, match="keys and values must be"):
        block_sparse_attention_fp8(query, wrong, starts, lengths)


def test_block_sparse_attention_fp8_passes_the_checks_of_custom_operators(generator):
    arguments, keywords = random_call(generator, dim=128, queries=9, keys=20, ordered=True)
    query, rows, starts, lengths = quantized(arguments)
    key, value, *scales = rows.tensors
    operands = (query, key, value, starts, lengths, keywords["query_order"], None, None, None)
    for name in ("block_sparse_attention_fp8", "block_sparse_attention_fp8_into"):
        more = (True, "reference")
        if name.endswith("into"):
            more = (*more, torch.empty_like(query))
        torch.library.opcheck(
            getattr(torch.ops.svg_kernels, name).default,
            (*operands, None, 0.1, *scales, *more),
            test_utils=("test_faketensor",),  # the other multiplies e4m3, which torch cannot
        )
