"""Command lines that nobody can mean end in one sentence and exit code 2, soon."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hostile import HOSTILE
from typer.testing import CliRunner

from svg_models.cli import app

WITHOUT_TORCH = """
import sys
from hostile import HOSTILE, NEEDS_TORCH
from typer.testing import CliRunner
from svg_models.cli import app

assert "torch" not in sys.modules, "the command itself imports it"
for name, (words, _) in HOSTILE.items():
    if name not in NEEDS_TORCH:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2, (name, result.output)
        assert "torch" not in sys.modules, name
for command in ("", "generate", "compare", "tune"):
    assert CliRunner().invoke(app, [*command.split(), "--help"]).exit_code == 0
    assert "torch" not in sys.modules, command
for words in (["--version"],):
    assert CliRunner().invoke(app, words).exit_code == 0
    assert "torch" not in sys.modules, words
"""


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 72


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_line_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, says = HOSTILE[name]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert len(lines[0]) < 1000
    assert all(c.isprintable() for c in lines[0]), "a terminal would obey it"
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_they_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r})\n{WITHOUT_TORCH}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
