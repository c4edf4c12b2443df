"""The examples of this package run as they stand."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

import svg_models
from svg_models.video import read_video

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs a checkout of the repository"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Run an example in a folder of its own and return what it prints.

    In this process: a new one takes longer to import diffusers than the example to run.
    """

    def script(name: str) -> str:
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def test_example_a_pipeline_is_made_sparse_and_reports(
    run: Callable[[str], str], tmp_path: Path
) -> None:
    output = run("sparse_pipeline.py")
    calls, density = re.findall(r"(\d+) sparse calls, mean density ([\d.]+)", output)[0]
    assert int(calls) > 0
    assert 0 < float(density) < 1
    frames, fps = read_video(tmp_path / "star.mp4")
    assert (frames.shape, fps) == ((17, 128, 128, 3), 16)
    assert "sparse calls" in (tmp_path / "run.html").read_text().lower()


def test_example_methods_are_compared(run: Callable[[str], str], tmp_path: Path) -> None:
    output = run("compare_methods.py")
    svg2, random = (float(x) for x in re.findall(r"([\d.]+) dB", output))
    assert svg2 > random
    assert (tmp_path / "comparison" / "index.html").stat().st_size > 100_000
    assert svg_models.__version__ in (tmp_path / "comparison" / "index.html").read_text()
