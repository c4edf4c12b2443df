"""Whatever is passed, the checks in words refuse it with a sentence or the operation runs."""

from __future__ import annotations

import math

import pytest
import torch
from attention_oracles import brute_force
from hypothesis import given, settings
from hypothesis import strategies as st

import svg_kernels
from svg_kernels.attention.operands import Operands, check_operands

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64]
SIZES = st.integers(0, 3)
SHAPES = st.lists(SIZES, max_size=5).map(tuple)


@st.composite
def tensors(draw, shape=None, dtype=None):
    """Draw a tensor of any shape and dtype, mostly the given ones, or no tensor at all."""
    odd = draw(st.integers(0, 9))
    if odd == 0:
        return draw(st.sampled_from([None, 1.0, [1.0, 2.0], "x"]))
    if shape is None or odd == 1:
        shape = draw(SHAPES)
    elif odd == 2 and shape:
        place = draw(st.integers(0, len(shape) - 1))
        shape = (*shape[:place], draw(SIZES), *shape[place + 1 :])
    if dtype is None or odd == 3:
        dtype = draw(st.sampled_from(DTYPES))
    device = "meta" if odd == 4 and draw(st.booleans()) else "cpu"
    return torch.ones(shape, dtype=dtype, device=device)


def refused(function, *arguments, **options):
    """Return the sentence of a refusal, None if the call went through; let other faults pass."""
    sentence = None
    try:
        function(*arguments, **options)
    except (TypeError, ValueError) as error:
        sentence = str(error)
    assert sentence is None or " " in sentence, "a refusal is a sentence"
    return sentence


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_check_operands_refuses_or_returns_operands(data):
    batch, heads, keys, width, runs = (data.draw(st.integers(1, 3)) for _ in range(5))
    length = data.draw(st.sampled_from([1, 128, 130]))
    tiles = math.ceil(length / 128)
    query = data.draw(tensors((batch, heads, length, width), torch.float32))
    key = data.draw(tensors((batch, 1, keys, width), torch.float32))
    value = data.draw(tensors((batch, 1, keys, width), torch.float32))
    starts = data.draw(tensors((batch, heads, tiles, runs), torch.int32))
    lengths = data.draw(tensors((batch, heads, tiles, runs), torch.int32))
    order = data.draw(st.none() | tensors((batch, heads, length), torch.int32))
    summary = data.draw(
        st.none()
        | st.tuples(
            tensors((batch, 1, 2, width), torch.float32),
            tensors((batch, 1, 2, width), torch.float32),
            tensors((batch, heads, tiles, 2), torch.float32),
        )
    )
    tile_order = data.draw(st.none() | tensors((batch * heads * tiles,), torch.int32))
    scale = data.draw(st.none() | st.floats())
    arguments = (query, key, value, starts, lengths, order, summary, tile_order, scale)
    if refused(check_operands, *arguments) is None:
        operands = check_operands(*arguments)
        assert isinstance(operands, Operands)
        assert operands.query.shape == query.shape
        assert operands.key.shape == operands.value.shape
        assert operands.run_starts.shape == operands.run_lengths.shape
        assert operands.scale > 0


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_block_sparse_attention_of_drawn_plans(data):
    rows, queries, dim = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 140)), 4
    tiles = math.ceil(queries / 128)
    slots = data.draw(st.integers(1, 5))
    starts = torch.zeros(1, 1, tiles, slots, dtype=torch.int32)
    lengths = torch.zeros_like(starts)
    for tile in range(tiles):
        edges = data.draw(
            st.lists(st.integers(0, rows), max_size=2 * slots, unique=True).map(sorted)
        )
        for slot, (start, stop) in enumerate(zip(edges[::2], edges[1::2])):  # noqa: B905
            starts[0, 0, tile, slot], lengths[0, 0, tile, slot] = start, stop - start
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    arguments = [
        torch.randn(1, 1, queries, dim, generator=draw),
        torch.randn(1, 1, rows, dim, generator=draw),
        torch.randn(1, 1, rows, dim, generator=draw),
        starts,
        lengths,
    ]
    order = torch.rand(1, 1, queries, generator=draw).argsort(-1).int()
    out, lse = svg_kernels.block_sparse_attention(*arguments, query_order=order, return_lse=True)
    want, want_lse = brute_force(*arguments, query_order=order)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "layer_norm_modulate", "gate_residual"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_check_rows_and_check_modulation_refuse_or_let_run(name, data):
    batch, tokens, width = (data.draw(st.integers(1, 3)) for _ in range(3))
    x = data.draw(tensors((batch, tokens, width), torch.float32))
    token = data.draw(tensors((batch, tokens, width), torch.float32))
    row = data.draw(tensors((batch, width), torch.float32))
    vector = data.draw(st.none() | tensors((width,), torch.float32))
    arguments = {
        "rms_norm": (x, vector),
        "layer_norm": (x, vector, vector),
        "layer_norm_modulate": (x, row, token),
        "gate_residual": (x, token, row),
    }[name]
    function = getattr(svg_kernels, name)
    if refused(function, *arguments) is None:
        assert function(*arguments).shape == x.shape


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_check_tables_refuses_or_lets_rope_run(data):
    heads, tokens, pairs = (data.draw(st.integers(1, 3)) for _ in range(3))
    x = data.draw(tensors((1, heads, tokens, 2 * pairs), torch.float32))
    shape = data.draw(
        st.sampled_from([(tokens, pairs), (tokens, 2 * pairs), (1, tokens, 1, pairs)])
    )
    cos = data.draw(tensors(shape, torch.float32))
    sin = data.draw(tensors(shape, torch.float32))
    start = data.draw(st.integers(-1, 2))
    if refused(svg_kernels.rope, x, cos, sin, start=start) is None:
        assert svg_kernels.rope(x, cos, sin, start=start).shape == x.shape


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_qk_norm_rope_refuses_or_runs(data):
    heads, tokens, pairs = (data.draw(st.integers(1, 3)) for _ in range(3))
    width = heads * 2 * pairs
    rows = [data.draw(tensors((1, tokens, width), torch.float32)) for _ in range(2)]
    weights = [data.draw(tensors((2 * pairs,), torch.float32)) for _ in range(2)]
    tables = [data.draw(st.none() | tensors((tokens, pairs), torch.float32)) for _ in range(2)]
    given_heads = data.draw(st.sampled_from([heads, heads, heads, 0, -1, 2]))
    arguments = (*rows, *weights, *tables)
    if refused(svg_kernels.qk_norm_rope, *arguments, heads=given_heads) is None:
        query, _ = svg_kernels.qk_norm_rope(*arguments, heads=given_heads)
        assert query.shape[:3] == (1, given_heads, rows[0].shape[1])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_permute_rows_refuses_or_runs(data):
    batch, heads, rows, width = (data.draw(st.integers(1, 3)) for _ in range(4))
    x = data.draw(tensors((batch, heads, rows, width)))
    order = data.draw(tensors((batch, heads, rows), torch.int32))
    if isinstance(order, torch.Tensor) and not order.is_meta:
        order = order.clamp(max=0)  # values are not what is tested here
    if refused(svg_kernels.permute_rows, x, order) is None:
        assert svg_kernels.permute_rows(x, order).shape[3] == x.shape[3]
