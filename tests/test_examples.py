"""The examples run as they stand; the documentation shows them from these files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def run(path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(path)]
    return subprocess.run(
        command, cwd=folder, text=True, capture_output=True, check=False, timeout=240
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path):
    if "svg_models" in path.read_text(encoding="utf-8"):
        pytest.skip("run by the tests of svg-models")
    done = run(path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example has something to show"
    if path.stem == "own_model":
        density, kept, error = (float(x) for x in re.findall(r"[\d.]+$", done.stdout, re.M))
        assert density <= 0.25
        assert kept > 0.9
        assert error < 0.1
    if path.stem == "own_dit":
        computed, error = (float(x) for x in re.findall(r"[\d.]+$", done.stdout, re.M))
        assert computed < 0.5
        assert 0 < error < 0.05


def test_every_example_is_shown_in_the_documentation():
    pages = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/**/*.md"))
    missing = [
        path.name for path in (*EXAMPLES, *NOTEBOOKS) if f"examples/{path.name}" not in pages
    ]
    assert missing == []
