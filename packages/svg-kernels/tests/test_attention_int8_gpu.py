"""The compiled kernel for keys in 8-bit integers, against what it should compute in fp64."""

from __future__ import annotations

import pytest
import torch
from attention_data import DATA, relative_error
from attention_oracles import (
    assert_spoiled_alike,
    permutations,
    random_call,
    random_runs,
    spoil,
)
from int8_oracles import attend_in_int8

from svg_kernels import block_sparse_attention, block_sparse_attention_int8, quantize_key
from svg_kernels.attention import reference
from svg_kernels.attention_int8 import unsupported

pytestmark = pytest.mark.gpu
FUZZ = 1000
DTYPES = [torch.bfloat16, torch.float16]
# Probabilities and the output in 16 bits, beside the rounding that the oracle does as well.
LIMITS = {torch.bfloat16: 6e-3, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _needs_hopper():
    reason = unsupported("cuda", torch.device("cuda", 0), torch.bfloat16, 128)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(5)


def on_gpu(x):
    if isinstance(x, torch.Tensor):
        return x.cuda()
    if isinstance(x, (list, tuple)):
        return type(x)(on_gpu(part) for part in x)
    return {name: on_gpu(part) for name, part in x.items()} if isinstance(x, dict) else x


def quantized(arguments):
    query, key, value, starts, lengths = arguments
    return query, quantize_key(key), value, starts, lengths


def full_plan(query, keys):
    shape = (*query.shape[:2], -(-query.shape[2] // 128), 1)
    starts = torch.zeros(shape, dtype=torch.int32, device=query.device)
    return starts, torch.full_like(starts, keys)


def assert_matches(arguments, keywords, limit=1.0):
    out = torch.full_like(arguments[0], torch.nan)
    _, lse = block_sparse_attention_int8(
        *arguments, return_lse=True, out=out, backend="cuda", **keywords
    )
    want, want_lse = attend_in_int8(*arguments, **keywords)
    assert torch.isfinite(out).all()
    assert torch.equal(torch.isneginf(lse), torch.isneginf(want_lse))
    read = torch.isfinite(want_lse)
    # What falls on the other side of a tie moves a score by a share of the query's size.
    apart = 1e-2 * arguments[0].double().std(correction=0).clamp(min=1.0)
    assert ((lse.double() - want_lse)[read].abs() < apart).all()
    assert relative_error(out, want) < limit * LIMITS[out.dtype]


def test_block_sparse_attention_int8_matches_the_oracle_on_random_plans(draw):
    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    for i in range(FUZZ):
        arguments, keywords = random_call(
            draw,
            dtype=DTYPES[i % 2],
            batch=integer(1, 2),
            heads=4,
            key_heads=[1, 2, 4][integer(0, 2)],
            queries=integer(1, 400),
            keys=integer(1, 1500),
            dim=128,
            runs=[1, 5, 40, 100][integer(0, 3)],
            summaries=[0, 0, 1, 130, 300][integer(0, 4)],
            ordered=bool(integer(0, 1)),
            magnitude=[1.0, 3.0, 12.0][integer(0, 2)],
            multiple=[1, 8][integer(0, 1)],
        )
        assert_matches(quantized(on_gpu(arguments)), on_gpu(keywords))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [8, 127, 128, 2048, 2500])
def test_block_sparse_attention_int8_of_a_full_plan(dtype, keys, draw):
    arguments, _ = on_gpu(random_call(draw, dtype=dtype, dim=128, queries=300, keys=keys))
    query, rows, value, _, _ = quantized(arguments)
    assert_matches((query, rows, value, *full_plan(query, keys)), {})


@pytest.mark.parametrize("nats", [20.0, 60.0, -60.0, 300.0])
def test_block_sparse_attention_int8_follows_scores_that_rise_or_fall(nats, draw):
    # Rows of one tile differ, and maxima are raised in most stages.
    arguments, _ = on_gpu(random_call(draw, dtype=torch.bfloat16, dim=128, queries=300, keys=1001))
    query, key, value, _, _ = arguments
    direction = torch.randn(128, generator=draw).cuda()
    direction /= direction.norm()
    along = torch.linspace(-nats, nats, 1001, device="cuda") * 128**0.5 / 16
    key = (key + along[:, None] * direction).to(query.dtype)
    query[:, :, 1::2] += (16 * direction).to(query.dtype)
    query, rows, *_ = quantized((query, key, value, None, None))
    assert_matches((query, rows, value, *full_plan(query, 1001)), {}, limit=2.0)


@pytest.mark.parametrize("name", DATA)
def test_block_sparse_attention_int8_is_as_close_as_its_digits_allow(name, draw):
    query, key, value = (x.cuda().bfloat16() for x in DATA[name](draw, 2, 2048))
    plan = full_plan(query, 2048)
    exact = block_sparse_attention(
        query.float(), key.float(), value.float(), *plan, backend="reference"
    ).double()
    arguments = (query, quantize_key(key), value, *plan)
    out = block_sparse_attention_int8(*arguments, backend="cuda")
    want, _ = attend_in_int8(*arguments)
    assert relative_error(out, exact) < 1.1 * relative_error(want, exact) + 3e-3


def test_block_sparse_attention_int8_keeps_nan_to_the_rows_that_read_it(draw):
    for summaries in (0, 130):
        arguments, keywords = random_call(
            draw, dtype=torch.bfloat16, batch=2, dim=128, queries=300, keys=900, runs=40,
            summaries=summaries,
        )  # fmt: skip
        spoil(arguments, keywords, draw)
        arguments, keywords = quantized(on_gpu(arguments)), on_gpu(keywords)
        out, lse = block_sparse_attention_int8(
            *arguments, return_lse=True, backend="cuda", **keywords
        )
        want, want_lse = attend_in_int8(*arguments, **keywords)
        assert_spoiled_alike(out, want, 3e-2)
        assert torch.equal(lse.isfinite(), want_lse.isfinite())


def test_block_sparse_attention_int8_counts_every_key_once(draw):
    # Equal logits and one-hot values: the output lists the keys that were read, all alike.
    starts, lengths = on_gpu(random_runs((1, 1, 5), 128, 30, draw))
    query = torch.zeros(1, 1, 640, 128, device="cuda", dtype=torch.float16)
    value = torch.eye(128, device="cuda", dtype=torch.float16)[None, None]
    rows = quantize_key(torch.zeros_like(value))
    out = block_sparse_attention_int8(query, rows, value, starts, lengths, backend="cuda")
    read = reference.read_mask(starts, lengths, 128).double()
    want = read / read.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(out[0, 0, ::128].double(), want[0, 0], rtol=1e-3, atol=1e-5)


def test_block_sparse_attention_int8_is_captured_and_replayed_with_new_data(draw):
    (query, key, value, starts, lengths), _ = on_gpu(
        random_call(draw, dtype=torch.bfloat16, dim=128)
    )
    order = on_gpu(permutations((1, 2), query.shape[2], draw))
    key_order = on_gpu(permutations((1, 2), key.shape[2], draw))
    arguments = (query, key, value, starts, lengths)

    def call():
        rows = quantize_key(key, key_order)
        return block_sparse_attention_int8(
            query, rows, value, starts, lengths, query_order=order, backend="cuda"
        )

    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    fresh, _ = on_gpu(random_call(draw, dtype=torch.bfloat16, dim=128))
    for old, new in zip(arguments, fresh, strict=True):
        old.copy_(new)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, call())
