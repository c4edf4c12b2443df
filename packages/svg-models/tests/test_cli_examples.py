"""The examples of this package run as they stand."""

from __future__ import annotations

import ast
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.mark.timeout(900)
def test_example_the_notebook_runs_cell_by_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run every cell in order, and show what its last line is worth as a notebook does."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "first_minute.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [], "a notebook is kept without its outputs"
        body = ast.parse("".join(cell["source"]))
        last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
        exec(compile(body, "cell", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            if value is not None:
                show = getattr(value, "_repr_html_", None)
                shown.append(show() if show else repr(value))
    page = "\n".join(shown)
    for words in ("SparseRun", "RunStats", "Comparison with dense", "<video", "SVG2 @ 30%"):
        assert words in page
    assert "step  0   22%  #########" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "comparison" / "index.html").is_file()
    assert 0.2 < names["run"].stats().mean_density <= 0.25


def test_example_methods_are_compared(run: Callable[[str], str], tmp_path: Path) -> None:
    output = run("compare_methods.py")
    svg2, random = (float(x) for x in re.findall(r"([\d.]+) dB", output))
    assert svg2 > random
    assert (tmp_path / "comparison" / "index.html").stat().st_size > 100_000
    assert svg_models.__version__ in (tmp_path / "comparison" / "index.html").read_text()
