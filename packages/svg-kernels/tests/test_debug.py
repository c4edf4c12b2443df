"""The checks of orders, runs and lengths that `SVG_DEBUG=1` turns on."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from attention_oracles import random_call
from hypothesis import given, settings
from hypothesis import strategies as st

import svg_kernels
from svg_kernels import _debug


@pytest.fixture
def debugging(monkeypatch):
    monkeypatch.setattr(_debug, "ENABLED", True)


def test_enabled_is_off_unless_asked_for():
    assert not _debug.ENABLED
    code = "from svg_kernels import _debug; print(_debug.ENABLED)"
    for value, enabled in (("1", "True"), ("0", "False"), ("", "False")):
        environment = {"SVG_DEBUG": value, "PYTHONPATH": ":".join(sys.path)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == enabled


def test_permute_rows_checks_its_order(debugging):
    x = torch.arange(12.0).view(1, 1, 4, 3)
    order = torch.tensor([3, 0, 0], dtype=torch.int32)
    assert svg_kernels.permute_rows(x, order)[0, 0, 0, 0] == 9
    with pytest.raises(ValueError, match=r"order must hold rows 0 to 3, got 4 at \[0, 0, 1\]"):
        svg_kernels.permute_rows(x, torch.tensor([3, 4, 0], dtype=torch.int32))
    with pytest.raises(ValueError, match="got -1"), torch.no_grad():
        svg_kernels.permute_rows((x, x), torch.tensor([3, -1, 0], dtype=torch.int32))


def test_unpermute_rows_checks_that_each_row_is_there(debugging):
    x = torch.zeros(1, 1, 4, 3)
    svg_kernels.unpermute_rows(x, torch.tensor([3, 1, 0, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="order must hold each of 4 rows once"):
        svg_kernels.unpermute_rows(x, torch.tensor([3, 1, 1, 2], dtype=torch.int32))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda a, k: a[3].fill_(-1), "run_starts must be at least 0"),
        (lambda a, k: a[4].fill_(-1), "run_lengths must be at least 0"),
        (lambda a, k: a[4].fill_(301), "runs must end within 300 key rows"),
        (lambda a, k: (a[3].fill_(7), a[4].fill_(2)), "runs of a tile must be disjoint"),
        (lambda a, k: (a[3].zero_(), a[4].zero_(), a[4][..., 1].fill_(2)), "used runs must come"),
        (lambda a, k: k["query_order"][0, 1].fill_(3), "query_order must hold each of 200 rows"),
        (lambda a, k: k["query_order"].add_(1), "query_order must hold rows 0 to 199"),
        (lambda a, k: k["tile_order"].zero_(), "tile_order must hold each of 4 rows"),
    ],
)
def test_block_sparse_attention_checks_its_indices(spoil, sentence, debugging, generator):
    arguments, keywords = random_call(generator, ordered=True)
    svg_kernels.block_sparse_attention(*arguments, **keywords)
    spoil(arguments, keywords)
    with pytest.raises(ValueError, match=sentence):
        svg_kernels.block_sparse_attention(*arguments, **keywords)


def test_probe_sums_checks_its_order_and_sizes(debugging):
    keys = torch.randn(1, 1, 20, 16)
    order = torch.arange(20).int().view(1, 1, 20)
    sizes = torch.tensor([[[5, 15]]], dtype=torch.int32)
    means = torch.randn(1, 1, 2, 16)
    probes = torch.randn(1, 1, 8, 16)
    arguments = [probes, keys, keys, order, means, means, sizes]
    svg_kernels.probe_sums(*arguments, length=128)
    with pytest.raises(ValueError, match="sizes must add up to 20, got 19"):
        svg_kernels.probe_sums(*arguments[:-1], sizes - torch.tensor([0, 1]).int(), length=128)
    arguments[3] = order.clamp(max=18)
    with pytest.raises(ValueError, match="order must hold each of 20 rows once"):
        svg_kernels.probe_sums(*arguments, length=128)


def test_fp8_attention_checks_its_indices(debugging, generator):
    arguments, keywords = random_call(generator, dtype=torch.bfloat16, dim=128, ordered=True)
    query, key, value, starts, lengths = arguments
    order = torch.arange(300).int().expand(1, 2, 300)
    quantized = svg_kernels.quantize_key_value(key, value, order)
    svg_kernels.block_sparse_attention_fp8(query, quantized, starts, lengths, **keywords)
    with pytest.raises(ValueError, match="runs must end within 300 key rows"):
        svg_kernels.block_sparse_attention_fp8(query, quantized, starts + 300, lengths, **keywords)
    with pytest.raises(ValueError, match="order must hold rows 0 to 299"):
        svg_kernels.quantize_key_value(key, value, order + 1)


def accepted(check, *arguments, **options):
    try:
        check(*arguments, **options)
    except ValueError:
        return False
    return True


RUNS = st.lists(st.tuples(st.integers(-2, 12), st.integers(-2, 6)), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(runs=RUNS, rows=st.integers(1, 12))
def test_check_runs_accepts_what_no_kernel_can_read_wrongly(runs, rows):
    starts, lengths = (torch.tensor(part, dtype=torch.int32) for part in zip(*runs, strict=True))
    used = [(start, length) for start, length in runs if length > 0]
    read = [row for start, length in used for row in range(start, start + length)]
    right = (
        all(length >= 0 for _, length in runs)
        and runs[: len(used)] == used
        and all(0 <= row < rows for row in read)
        and len(set(read)) == len(read)
    )
    assert accepted(_debug.check_runs, starts, lengths, rows) == right


@settings(max_examples=100, deadline=None)
@given(order=st.lists(st.integers(-1, 6), max_size=6), rows=st.integers(1, 6))
def test_check_order_accepts_permutations(order, rows):
    index = torch.tensor(order, dtype=torch.int32)
    inside = all(0 <= row < rows for row in order)
    assert accepted(_debug.check_order, "order", index, rows, permutation=False) == inside
    if len(order) == rows:
        right = sorted(order) == list(range(rows))
        assert accepted(_debug.check_order, "order", index, rows, permutation=True) == right


@pytest.mark.gpu
def test_check_order_asserts_where_a_graph_is_captured(debugging):
    x = torch.randn(1, 1, 4, 8, device="cuda")
    order = torch.tensor([3, 0, 1, 2], dtype=torch.int32, device="cuda")
    want = svg_kernels.permute_rows(x, order)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = svg_kernels.permute_rows(x, order)
    graph.replay()
    assert torch.equal(got, want)
