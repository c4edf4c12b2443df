from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "sizes", "widths"), [("86", "2", "128"), ("86", "4", "256")]
)
def test_compile_planning_fits_the_smallest_shared_memory(tmp_path, capability, sizes, widths):
    # In a process of its own: here kernels may have been decorated for the interpreter.
    pytest.importorskip("triton")
    script = Path(__file__).with_name("compile_planning.py")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DISABLE_LINE_INFO": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), capability, sizes, widths],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("probe_sums_kernel") == 1
