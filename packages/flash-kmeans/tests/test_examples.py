"""The example of the documentation runs and finds the digits."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_digits_finds_the_digits() -> None:
    pytest.importorskip("sklearn")
    script = Path(__file__).parents[1] / "examples" / "digits.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    score = float(re.search(r"digits ([\d.]+)", done.stdout)[1])  # type: ignore[index]
    assert score > 0.6
