"""The Triton backend as compiled for a GPU that is not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def output_of(script):
    """Run a script beside this file where nothing is interpreted; return what it prints."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reciprocal_std_rounds_square_root_and_division_correctly():
    assert output_of("compile_norms.py").split() == ["div.rn.f32", "sqrt.rn.f32"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quantize_key_value_fits_the_shared_memory_of_every_device():
    lines = [line.split() for line in output_of("compile_key_value_fp8.py").splitlines()]
    assert [int(capability) for capability, _ in lines] == [89, 90, 120]
    assert all(int(shared) <= 99 * 1024 for _, shared in lines)
