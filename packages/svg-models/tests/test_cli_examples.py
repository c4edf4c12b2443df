"""The examples of this package run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import svg_models
from svg_models.video import read_video

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs a checkout of the repository"),
]


def run(name: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_pipeline_is_made_sparse_and_reports(tmp_path: Path) -> None:
    output = run("sparse_pipeline.py", tmp_path)
    calls, density = re.findall(r"(\d+) sparse calls, mean density ([\d.]+)", output)[0]
    assert int(calls) > 0
    assert 0 < float(density) < 1
    frames, fps = read_video(tmp_path / "star.mp4")
    assert (frames.shape, fps) == ((33, 128, 128, 3), 16)
    assert "sparse calls" in (tmp_path / "run.html").read_text().lower()


def test_methods_are_compared(tmp_path: Path) -> None:
    output = run("compare_methods.py", tmp_path)
    svg2, random = (float(x) for x in re.findall(r"([\d.]+) dB", output))
    assert svg2 > random
    assert (tmp_path / "comparison" / "index.html").stat().st_size > 100_000
    assert svg_models.__version__ in (tmp_path / "comparison" / "index.html").read_text()
