"""The portable kernel: interpreted on a CPU, and compiled for devices that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_oracles import (
    OUTPUT_LAYOUTS,
    assert_spoiled_alike,
    brute_force,
    output_layout,
    random_call,
    random_runs,
    spoil,
)

from svg_kernels import block_sparse_attention

pytest.importorskip("triton")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {"queries": 1, "keys": 1, "runs": 1, "dim": 16},
        {"queries": 130, "keys": 150, "runs": 60, "dim": 64, "heads": 1, "key_heads": 1},
        {"queries": 60, "keys": 500, "runs": 3, "dim": 40, "key_heads": 1, "summaries": 70},
        {"queries": 130, "keys": 129, "runs": 9, "dim": 128, "batch": 2, "ordered": True},
        {"queries": 40, "keys": 200, "runs": 8, "dim": 160, "summaries": 5, "ordered": True},
    ],
    ids=str,
)
def test_block_sparse_attention_equals_the_reference(shape, dtype, generator):
    arguments, keywords = random_call(generator, dtype=dtype, **shape)
    got = block_sparse_attention(*arguments, return_lse=True, backend="triton", **keywords)
    want = block_sparse_attention(*arguments, return_lse=True, backend="reference", **keywords)
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("interpreted")
def test_block_sparse_attention_counts_every_key_once(generator):
    starts, lengths = random_runs((1, 1, 2), 128, 20, generator)
    query = torch.zeros(1, 1, 130, 128)
    key, value = torch.zeros(1, 1, 128, 128), torch.eye(128)[None, None]
    got = block_sparse_attention(query, key, value, starts, lengths, backend="triton")
    want = block_sparse_attention(query, key, value, starts, lengths, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("interpreted")
def test_block_sparse_attention_without_run_slots(generator):
    arguments, keywords = random_call(generator, summaries=9)
    empty = torch.zeros(1, 2, 2, 0, dtype=torch.int32)
    arguments[3:] = [empty, empty]
    got = block_sparse_attention(*arguments, backend="triton", **keywords)
    want = block_sparse_attention(*arguments, backend="reference", **keywords)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("layout", OUTPUT_LAYOUTS)
def test_block_sparse_attention_writes_into_any_layout(layout, generator):
    arguments, keywords = random_call(generator, queries=140, dim=20, ordered=True, summaries=3)
    want = block_sparse_attention(*arguments, backend="triton", **keywords)
    out, whole = output_layout(layout, arguments[0])
    assert block_sparse_attention(*arguments, out=out, backend="triton", **keywords) is out
    assert torch.equal(out, want)
    assert whole.isnan().sum() == whole.numel() - want.numel(), "nothing else may be written"


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("summaries", [0, 5])
@pytest.mark.parametrize("seed", range(3))
def test_block_sparse_attention_keeps_nan_to_the_rows_that_read_it(summaries, seed):
    draw = torch.Generator().manual_seed(seed)
    arguments, keywords = random_call(
        draw, queries=300, keys=150, runs=6, dim=16, ordered=True, summaries=summaries
    )
    spoil(arguments, keywords, draw, values=(torch.nan,))
    want, want_lse = brute_force(*arguments, **keywords)
    out, lse = block_sparse_attention(*arguments, return_lse=True, backend="triton", **keywords)
    assert_spoiled_alike(out, want, 1e-5)
    assert torch.equal(lse.isfinite(), want_lse.isfinite())


@pytest.mark.slow
def test_block_sparse_attention_kernel_fits_every_device_of_its_table(tmp_path):
    # In processes of their own: here kernels may have been decorated for the interpreter.
    script = Path(__file__).with_name("compile_attention.py")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DISABLE_LINE_INFO": "1",
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(part), "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for part in range(2)
    ]
    answers = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "".join(answers)
