"""Both kernels on a GPU, against fp64."""

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

from svg_kernels import block_sparse_attention
from svg_kernels.attention import reference, unsupported
from svg_kernels.attention.operands import Operands

pytestmark = pytest.mark.gpu
FUZZ = 1000
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    reason = unsupported(request.param, torch.device("cuda", 0), torch.bfloat16, 128)
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(5)


def on_gpu(x):
    if isinstance(x, torch.Tensor):
        return x.cuda()
    if isinstance(x, (list, tuple)):
        return type(x)(on_gpu(part) for part in x)
    return {name: on_gpu(part) for name, part in x.items()} if isinstance(x, dict) else x


def fp64(arguments, keywords):
    """Return output and log-sum-exp in fp64 on the same inputs, by the reference."""
    query, key, value, starts, lengths = arguments
    operands = Operands(
        query.double(),
        key.double(),
        value.double(),
        starts,
        lengths,
        keywords.get("query_order"),
        *([x.double() for x in keywords.get("summary", ())] or [None] * 3),
        None,
        query.shape[-1] ** -0.5,
    )
    out = torch.empty(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float64, device=query.device)
    reference.block_sparse_attention(operands, out, lse)
    return out, lse


def expand(starts, lengths, queries, keys):
    mask = reference.read_mask(starts, lengths, keys)
    return mask.repeat_interleave(128, dim=2)[:, :, :queries]


def assert_matches(arguments, keywords, backend, dtype):
    out, lse = block_sparse_attention(*arguments, return_lse=True, backend=backend, **keywords)
    exact, exact_lse = fp64(arguments, keywords)
    assert torch.isfinite(out).all()
    assert torch.equal(torch.isneginf(lse), torch.isneginf(exact_lse))
    finite = torch.isfinite(exact_lse)
    torch.testing.assert_close(lse[finite].double(), exact_lse[finite], rtol=1e-4, atol=1e-3)
    error = (out.double() - exact).norm() / exact.norm().clamp_min(1e-12)
    assert error < (5e-3 if dtype == torch.bfloat16 else 1e-3), f"relative error {error:.2e}"


def test_block_sparse_attention_of_a_thousand_random_plans(draw):
    reason = unsupported("cuda", torch.device("cuda", 0), torch.bfloat16, 128)
    if reason:
        pytest.skip(reason)

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    for i in range(FUZZ):
        dtype = DTYPES[i % 2]
        arguments, keywords = random_call(
            draw,
            dtype=dtype,
            batch=integer(1, 2),
            heads=4,
            key_heads=[1, 2, 4][integer(0, 2)],
            queries=integer(1, 400),
            keys=integer(1, 900),
            dim=[64, 128][integer(0, 1)],
            runs=[1, 5, 40, 100][integer(0, 3)],
            summaries=[0, 0, 1, 130][integer(0, 3)],
            ordered=bool(integer(0, 1)),
            magnitude=[1.0, 7.0, 40.0][integer(0, 2)],
            multiple=[1, 8][integer(0, 1)],
        )
        assert_matches(on_gpu(arguments), on_gpu(keywords), "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_block_sparse_attention_of_random_plans(backend, dtype, dim, draw):
    for queries, keys, runs in ((300, 1000, 40), (128, 64, 5), (257, 700, 200)):
        arguments, keywords = random_call(
            draw, dtype=dtype, queries=queries, keys=keys, runs=runs, dim=dim, ordered=True
        )
        assert_matches(on_gpu(arguments), on_gpu(keywords), backend, dtype)


@pytest.mark.parametrize("dim", [40, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_block_sparse_attention_in_triton_takes_other_head_sizes(dtype, dim, draw):
    arguments, keywords = random_call(draw, dtype=dtype, dim=dim, ordered=True, summaries=9)
    assert_matches(on_gpu(arguments), on_gpu(keywords), "triton", torch.bfloat16)


def test_block_sparse_attention_of_skewed_clusters(backend, draw, assert_accurate):
    # One cluster holds 30 % of the keys, a hundred hold one each, some are empty or awkward.
    sizes = [1] * 50 + [450, 0, 63, 64, 65, 0, 7] + [1] * 50 + [301]
    (query, key, value, _, _), _ = random_call(
        draw, dtype=torch.bfloat16, queries=300, keys=sum(sizes), dim=128
    )
    kept = torch.rand(1, 2, 3, len(sizes), generator=draw) < 0.5
    kept[..., 50] = True
    starts, lengths = on_gpu(runs_of_blocks(sizes, kept))
    query, key, value = on_gpu([query, key, value])
    got = block_sparse_attention(query, key, value, starts, lengths, backend=backend)
    mask = expand(starts, lengths, query.shape[2], key.shape[2])
    plain = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    exact = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask
    )
    assert_accurate(got, plain, exact)


def test_block_sparse_attention_with_scores_of_magnitude_fifty(backend, draw, assert_accurate):
    (query, key, value, starts, lengths), _ = on_gpu(
        random_call(draw, dtype=torch.bfloat16, dim=128, keys=700, runs=9)
    )
    lengths[..., 0] = lengths[..., 0].clamp(min=1)  # no row without keys: SDPA would not be finite
    query = query * (50.0 / 11.3)
    got = block_sparse_attention(query, key, value, starts, lengths, backend=backend)
    mask = expand(starts, lengths, query.shape[2], key.shape[2])
    plain = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    exact = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask
    )
    assert_accurate(got, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1024, 1001])
@pytest.mark.parametrize("nats", [20.0, 300.0, -300.0])
def test_block_sparse_attention_with_scores_that_rise_or_fall_along_the_keys(
    backend, dtype, keys, nats, draw
):
    # The kernel keeps the maximum of the first stage for as long as sums of probabilities allow.
    arguments, _ = on_gpu(random_call(draw, dtype=dtype, dim=128, queries=300, keys=keys, runs=1))
    query, key, _, starts, lengths = arguments
    query[..., 0] = 16
    key[..., 0] = torch.linspace(-nats, nats, keys, device="cuda") * 128**0.5 / 16
    query[:, :, ::2, 0] = 0  # rows of one tile differ
    starts.zero_()
    lengths.fill_(keys)
    assert_matches(arguments, {}, backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_sparse_attention_whose_first_stage_counts_for_nothing(backend, dtype, draw):
    arguments, keywords = on_gpu(
        random_call(draw, dtype=dtype, dim=128, queries=300, keys=64, runs=1, summaries=400)
    )
    query, _, _, _, lengths = arguments
    key, _, weights = keywords["summary"]
    lengths.zero_()
    query[..., 0] = 16
    key[..., 0] = -300 * 128**0.5 / 16  # far below what a maximum of zero would leave
    weights[..., :260] = -torch.inf
    assert_matches(arguments, keywords, backend, dtype)


def test_block_sparse_attention_of_a_full_plan_is_dense(backend, draw, assert_accurate):
    (query, key, value, starts, lengths), _ = on_gpu(
        random_call(draw, dtype=torch.bfloat16, dim=128, queries=513, keys=1025, runs=1)
    )
    starts.zero_()
    lengths.fill_(1025)
    got = block_sparse_attention(query, key, value, starts, lengths, backend=backend)
    plain = F.scaled_dot_product_attention(query, key, value)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert_accurate(got, plain, exact)


def test_block_sparse_attention_counts_every_key_once(backend, draw):
    # Equal logits and one-hot values: the output lists the keys that were read, all alike.
    starts, lengths = on_gpu(random_runs((1, 1, 5), 128, 30, draw))
    query = torch.zeros(1, 1, 640, 128, device="cuda", dtype=torch.float16)
    value = torch.eye(128, device="cuda", dtype=torch.float16)[None, None]
    out = block_sparse_attention(
        query, torch.zeros_like(value), value, starts, lengths, backend=backend
    )
    read = reference.read_mask(starts, lengths, 128).double()
    want = read / read.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(out[0, 0, ::128].double(), want[0, 0], rtol=1e-3, atol=1e-6)


def test_block_sparse_attention_reads_strided_inputs(backend, draw):
    (query, key, value, starts, lengths), _ = on_gpu(
        random_call(draw, dtype=torch.bfloat16, dim=128)
    )
    plain = block_sparse_attention(query, key, value, starts, lengths, backend=backend)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    got = block_sparse_attention(*strided, starts, lengths, backend=backend)
    assert torch.equal(got, plain)


@pytest.mark.parametrize("layout", OUTPUT_LAYOUTS)
@pytest.mark.parametrize("dim", [64, 128])
def test_block_sparse_attention_writes_into_any_layout(backend, layout, dim, draw):
    arguments, keywords = on_gpu(
        random_call(
            draw, dtype=torch.bfloat16, batch=2, queries=300, dim=dim, ordered=True, summaries=9
        )
    )
    want, want_lse = block_sparse_attention(
        *arguments, return_lse=True, backend=backend, **keywords
    )
    out, whole = output_layout(layout, arguments[0])
    got, lse = block_sparse_attention(
        *arguments, return_lse=True, out=out, backend=backend, **keywords
    )
    assert got is out
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert whole.isnan().sum() == whole.numel() - want.numel(), "nothing else may be written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("summaries", [0, 130])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("seed", range(5))
def test_block_sparse_attention_keeps_nan_to_the_rows_that_read_it(
    backend, dtype, summaries, multiple, seed
):
    draw = torch.Generator().manual_seed(seed)
    arguments, keywords = random_call(
        draw, dtype=dtype, batch=2, queries=300, keys=700, runs=9, dim=128, ordered=True,
        summaries=summaries, multiple=multiple,
    )  # fmt: skip
    # Triton multiplies the padding of a chunk, weight 0, with a row that the tile reads.
    spoil(arguments, keywords, draw, values=(torch.nan, torch.inf)[: 2 - (backend == "triton")])
    want, want_lse = brute_force(*arguments, **keywords)
    out, lse = block_sparse_attention(
        *on_gpu(arguments), return_lse=True, backend=backend, **on_gpu(keywords)
    )
    assert_spoiled_alike(out.cpu(), want, 2e-2)
    assert torch.equal(lse.cpu().isfinite(), want_lse.isfinite())


def test_block_sparse_attention_is_captured_and_replayed_with_new_data(backend, draw):
    (query, key, value, starts, lengths), _ = on_gpu(
        random_call(draw, dtype=torch.bfloat16, dim=128)
    )
    order = on_gpu(permutations((1, 2), query.shape[2], draw))
    arguments = (query, key, value, starts, lengths)
    block_sparse_attention(*arguments, query_order=order, backend=backend)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_sparse_attention(*arguments, query_order=order, backend=backend)
    fresh, _ = on_gpu(random_call(draw, dtype=torch.bfloat16, dim=128))
    for old, new in zip(arguments, fresh, strict=True):
        old.copy_(new)
    out.fill_(torch.nan)
    graph.replay()
    want = block_sparse_attention(*arguments, query_order=order, backend=backend)
    assert torch.equal(out, want)
