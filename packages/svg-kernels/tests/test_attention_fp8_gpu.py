"""The compiled kernel for keys and values in e4m3, against what it should compute in fp64."""

from __future__ import annotations

import pytest
import torch
from attention_oracles import permutations, random_call, random_runs
from fp8_oracles import DATA, at_ties, attend_in_e4m3, relative_error

from svg_kernels import block_sparse_attention, block_sparse_attention_fp8, quantize_key_value
from svg_kernels.attention import reference
from svg_kernels.attention_fp8 import unsupported

pytestmark = pytest.mark.gpu
FUZZ = 1000
DTYPES = [torch.bfloat16, torch.float16]


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
    return query, quantize_key_value(key, value), starts, lengths


def full_plan(query, keys):
    shape = (*query.shape[:2], -(-query.shape[2] // 128), 1)
    starts = torch.zeros(shape, dtype=torch.int32, device=query.device)
    return starts, torch.full_like(starts, keys)


def assert_matches(arguments, keywords, limit=2e-2):
    # Beside the rounding that the oracle does as well there are sums cut off at some 14 bits. A
    # probability near the middle between two numbers of e4m3 falls on the other side then, which
    # moves a row that it dominates by up to an eighth. With scores of many nats that happens to
    # many rows, and to none by much; in a plan of a few rows one of them can move the whole output
    # by more than `limit`. What a kernel gets wrong shows in sixteen rows at least.
    out = torch.full_like(arguments[0], torch.nan)
    _, lse = block_sparse_attention_fp8(
        *arguments, return_lse=True, out=out, backend="cuda", **keywords
    )
    want, want_lse = attend_in_e4m3(*arguments, **keywords)
    assert torch.isfinite(out).all()
    assert torch.equal(torch.isneginf(lse), torch.isneginf(want_lse))
    read = torch.isfinite(want_lse)
    # An element of a query falls on the other side of a tie as well, where the rotation is summed
    # in another order. That moves all scores of one row, by an element's last digit times a key's.
    apart = (lse.double() - want_lse)[read].abs()
    near = 5e-2 * arguments[0].double().std(correction=0).clamp(min=1.0)
    tied, moves = (x[read] for x in at_ties(*arguments[:2]))
    assert ((apart < near) | tied).all(), (apart[~tied].max(), near)
    assert (apart < near + 2 * moves).all(), apart.max()
    whole = relative_error(out, want)
    errors = (out.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)
    few = (errors > limit).sum() <= 2 + errors.numel() / 25
    assert whole < limit or (few and errors.max() < 1 / 8 + limit), (whole, errors.max())


def test_block_sparse_attention_fp8_matches_the_oracle_on_random_plans(draw):
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
            summaries=[0, 0, 1, 130][integer(0, 3)],
            ordered=bool(integer(0, 1)),
            magnitude=[1.0, 3.0, 12.0][integer(0, 2)],
            multiple=[1, 8][integer(0, 1)],
        )
        assert_matches(quantized(on_gpu(arguments)), on_gpu(keywords))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [8, 127, 128, 2048, 2500])
def test_block_sparse_attention_fp8_of_a_full_plan(dtype, keys, draw):
    arguments, _ = on_gpu(random_call(draw, dtype=dtype, dim=128, queries=300, keys=keys))
    query, rows, _, _ = quantized(arguments)
    assert_matches((query, rows, *full_plan(query, keys)), {})


@pytest.mark.parametrize("nats", [20.0, 60.0, -60.0])
def test_block_sparse_attention_fp8_follows_scores_that_rise_or_fall(nats, draw):
    # Rows of one tile differ, and maxima are raised in most stages.
    arguments, _ = on_gpu(random_call(draw, dtype=torch.bfloat16, dim=128, queries=300, keys=1001))
    query, key, value, _, _ = arguments
    direction = torch.randn(128, generator=draw).cuda()
    direction /= direction.norm()
    along = torch.linspace(-nats, nats, 1001, device="cuda") * 128**0.5 / 16
    key = (key + along[:, None] * direction).to(query.dtype)
    query[:, :, 1::2] += (16 * direction).to(query.dtype)
    query, rows, *_ = quantized((query, key, value, None, None))
    assert_matches((query, rows, *full_plan(query, 1001)), {})


def test_block_sparse_attention_fp8_follows_a_leap_farther_than_fp32_reaches(draw):
    # Exponentials relative to the maxima before are infinite: the stage is computed anew. Scores
    # of 150 nats that the tensor cores know to 13 bits move probabilities by 2 %, a third of what
    # lies between two numbers in e4m3.
    arguments, _ = on_gpu(random_call(draw, dtype=torch.bfloat16, dim=128, queries=300, keys=1001))
    query, key, value, _, _ = arguments
    direction = torch.randn(128, generator=draw).cuda()
    direction /= direction.norm()
    along = torch.where(torch.arange(1001, device="cuda") < 500, -150.0, 75.0) * 128**0.5 / 16
    key = (key + along[:, None] * direction).to(query.dtype)
    query[:, :, 1::2] += (16 * direction).to(query.dtype)
    query, rows, *_ = quantized((query, key, value, None, None))
    assert_matches((query, rows, *full_plan(query, 1001)), {}, limit=5e-2)


def test_block_sparse_attention_fp8_promotes_its_sums(draw):
    # Equal weights and values that do not cancel: what sums cut off would show.
    key = torch.randn(1, 1, 40_000, 128, generator=draw).cuda().bfloat16()
    value = (key[..., :1] > 0).expand_as(key).to(key.dtype)
    query = torch.zeros(1, 1, 128, 128, device="cuda", dtype=key.dtype)
    rows = quantize_key_value(key, value)
    rows.value_mean.zero_()  # the whole of the values is summed up, not what is left of them
    rows.value.copy_((value * 448).to(rows.value.dtype))
    rows.value_scale.fill_(1 / 448)
    out = block_sparse_attention_fp8(query, rows, *full_plan(query, 40_000), backend="cuda")
    share = value.double().mean()
    assert ((out.double() - share).abs() < 6e-3 * share).all()


@pytest.mark.parametrize("name", DATA)
def test_block_sparse_attention_fp8_is_as_close_as_its_digits_allow(name, draw):
    query, key, value = (x.cuda().bfloat16() for x in DATA[name](draw, 2, 4096))
    plan = full_plan(query, 4096)
    exact = block_sparse_attention(
        query.float(), key.float(), value.float(), *plan, backend="reference"
    ).double()
    rows = quantize_key_value(key, value)
    out = block_sparse_attention_fp8(query, rows, *plan, backend="cuda")
    want, _ = attend_in_e4m3(query, rows, *plan)
    assert relative_error(out, exact) < 1.1 * relative_error(want, exact) + 3e-3


def test_block_sparse_attention_fp8_counts_every_key_once(draw):
    # Equal logits and one-hot values: the output lists the keys that were read, all alike.
    starts, lengths = on_gpu(random_runs((1, 1, 5), 128, 30, draw))
    query = torch.zeros(1, 1, 640, 128, device="cuda", dtype=torch.float16)
    value = torch.eye(128, device="cuda", dtype=torch.float16)[None, None]
    rows = quantize_key_value(torch.zeros_like(value), value)
    out = block_sparse_attention_fp8(query, rows, starts, lengths, backend="cuda")
    read = reference.read_mask(starts, lengths, 128).double()
    want = read / read.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(out[0, 0, ::128].double(), want[0, 0], rtol=4e-2, atol=1e-3)


def test_block_sparse_attention_fp8_is_captured_and_replayed_with_new_data(draw):
    (query, key, value, starts, lengths), _ = on_gpu(
        random_call(draw, dtype=torch.bfloat16, dim=128)
    )
    order = on_gpu(permutations((1, 2), query.shape[2], draw))
    key_order = on_gpu(permutations((1, 2), key.shape[2], draw))
    arguments = (query, key, value, starts, lengths)

    def call():
        rows = quantize_key_value(key, value, key_order)
        return block_sparse_attention_fp8(
            query, rows, starts, lengths, query_order=order, backend="cuda"
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
