"""The attention kernels for Hopper themselves, run on the CPU by `emulator/`, against fp64.

Matrix products, bulk loads and barriers are emulated: layouts, phases of pipelines and arithmetic
are tested, what is asynchronous on a GPU is not.
"""

from __future__ import annotations

import emulate
import pytest
import torch
from attention_oracles import assert_spoiled_alike, brute_force, random_call, spoil
from fp8_oracles import attend_in_e4m3, relative_error

from svg_kernels import _dispatch, _library, attention, attention_fp8, quantize_key_value

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]  # compiling takes a minute
CPU = torch.device("cpu")

PLANS = {
    "whole stages": {"queries": 130, "keys": 700, "runs": 3, "multiple": 8},
    "ragged runs": {"queries": 70, "keys": 900, "runs": 40, "ordered": True, "magnitude": 6.0},
    "summaries": {"queries": 129, "keys": 300, "runs": 9, "summaries": 130, "key_heads": 1},
    "batch of two": {"queries": 65, "keys": 500, "runs": 5, "batch": 2, "ordered": True},
}
CASES = [*((plan, torch.bfloat16) for plan in PLANS), ("ragged runs", torch.float16)]


class OnStreamZero:
    """The library's launchers, for a CPU that has neither device number nor stream."""

    def __init__(self, library):
        self.library = library

    def __getattr__(self, name):
        function = getattr(self.library, name)
        return lambda described, scale, device, stream: function(described, scale, 0, 0)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    ffi = pytest.importorskip("tvm_ffi")
    if reason := emulate.missing():
        pytest.skip(reason)
    path = emulate.build_attention(tmp_path_factory.mktemp("emulated"))
    return ffi.load_module(str(path))


@pytest.fixture(autouse=True)
def _emulated(library, monkeypatch):
    found = _library.Library(functions=OnStreamZero(library))
    monkeypatch.setitem(_library._libraries, CPU, found)
    monkeypatch.setattr(_dispatch, "_no_cuda_device", lambda device: None)
    monkeypatch.setattr(_dispatch, "_selected", {})
    monkeypatch.setattr(attention.limits, "_not_compiled", lambda *traits: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)


def poisoned(query):
    return torch.full_like(query, torch.nan)


def assert_lse_close(found, want):
    assert torch.equal(torch.isneginf(found), torch.isneginf(want))
    read = torch.isfinite(want)
    torch.testing.assert_close(found[read].double(), want[read], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("plan", "dtype"), CASES)
def test_block_sparse_attention_emulated_matches_fp64(plan, dtype, generator):
    arguments, keywords = random_call(generator, dtype=dtype, dim=128, **PLANS[plan])
    out = poisoned(arguments[0])
    _, lse = attention.block_sparse_attention(
        *arguments, return_lse=True, out=out, backend="cuda", **keywords
    )
    want, want_lse = brute_force(*arguments, **keywords)
    assert relative_error(out, want) < (5e-3 if dtype == torch.bfloat16 else 1e-3)
    assert_lse_close(lse, want_lse)


@pytest.mark.parametrize(("plan", "seed"), [("ragged runs", 1), ("summaries", 0)])
def test_block_sparse_attention_emulated_keeps_nan_to_the_rows_that_read_it(plan, seed, generator):
    # Both fail where tiles whose outputs are not finite are not computed again.
    generator.manual_seed(seed)
    sizes = PLANS[plan] | {"batch": 2}
    arguments, keywords = random_call(generator, dtype=torch.bfloat16, dim=128, **sizes)
    spoil(arguments, keywords, generator)
    out, lse = attention.block_sparse_attention(
        *arguments, return_lse=True, backend="cuda", **keywords
    )
    want, want_lse = brute_force(*arguments, **keywords)
    assert_spoiled_alike(out, want, 2e-2)
    assert torch.equal(lse.isfinite(), want_lse.isfinite())


@pytest.mark.parametrize(("plan", "dtype"), CASES)
def test_block_sparse_attention_fp8_emulated_matches_the_oracle(plan, dtype, generator):
    arguments, keywords = random_call(generator, dtype=dtype, dim=128, **PLANS[plan])
    query, key, value, starts, lengths = arguments
    rows = quantize_key_value(key, value)
    out = poisoned(query)
    _, lse = attention_fp8.block_sparse_attention_fp8(
        query, rows, starts, lengths, return_lse=True, out=out, backend="cuda", **keywords
    )
    want, want_lse = attend_in_e4m3(query, rows, starts, lengths, **keywords)
    assert relative_error(out, want) < 5e-3
    assert_lse_close(lse, want_lse)


# Scores along the keys: they rise by more in each stage than a maximum leaves room for, or leap
# once, farther than exponentials in fp32 reach, so that a stage must be computed anew.
RISING = torch.linspace(-30, 30, 1301)
LEAPING = torch.where(torch.arange(1301) < 500, -30.0, 80.0)


@pytest.mark.parametrize("along", [RISING, LEAPING], ids=["rising", "leaping"])
def test_block_sparse_attention_fp8_emulated_raises_its_maxima(along, generator):
    shape = {"heads": 1, "key_heads": 1, "queries": 70, "keys": 1301, "runs": 1}
    (query, key, value, starts, lengths), _ = random_call(
        generator, dtype=torch.bfloat16, dim=128, **shape
    )
    starts.zero_()
    lengths.fill_(1301)
    direction = torch.randn(128, generator=generator)
    direction /= direction.norm()
    key += (along[:, None] * direction).to(key.dtype)
    query[:, :, 1::2] += (16 * direction).to(query.dtype)
    rows = quantize_key_value(key, value)
    out = poisoned(query)
    _, lse = attention_fp8.block_sparse_attention_fp8(
        query, rows, starts, lengths, return_lse=True, out=out, backend="cuda"
    )
    want, want_lse = attend_in_e4m3(query, rows, starts, lengths)
    assert relative_error(out, want) < 5e-3
    assert_lse_close(lse, want_lse)


def test_block_sparse_attention_fp8_emulated_promotes_its_sums(generator):
    # More stages than are summed up between two promotions, and rings that go round.
    (query, key, value, starts, lengths), _ = random_call(
        generator,
        dtype=torch.bfloat16,
        dim=128,
        heads=1,
        key_heads=1,
        queries=40,
        keys=4736,
        runs=1,
    )
    starts.zero_()
    lengths.fill_(4736)
    rows = quantize_key_value(key, value)
    out = poisoned(query)
    attention_fp8.block_sparse_attention_fp8(query, rows, starts, lengths, out=out, backend="cuda")
    want, _ = attend_in_e4m3(query, rows, starts, lengths)
    assert relative_error(out, want) < 5e-3
