"""A model folder that somebody made wrong is one sentence, and costs neither time nor memory."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
import tiny
from click.testing import Result
from malformed import MALFORMED
from typer.testing import CliRunner

from svg_models.cli import app
from svg_models.errors import ModelUnavailableError
from svg_models.loading import load_pipeline

pytestmark = pytest.mark.usefixtures("one_thread", "untouched_memory")
MOST_SECONDS = 20  # on a busy machine; each takes a fraction of a second
MOST_MEMORY = 400 << 20  # bytes


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "sound"
    tiny.pipeline().save_pretrained(path)
    return path


def generate(folder: Path, output: Path) -> Result:
    words = ["generate", "a red circle", "-m", str(folder), "--size", "48x48", "--frames", "5"]
    words += ["--steps", "1", "--device", "cpu", "-o", str(output), "--method", "dense"]
    return CliRunner().invoke(app, words)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_the_folder_that_is_changed_works(sound: Path, tmp_path: Path) -> None:
    result = generate(sound, tmp_path / "clip.mp4")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "clip.mp4").stat().st_size > 0


def test_there_are_enough_of_them() -> None:
    assert len(MALFORMED) >= 69


@pytest.mark.parametrize("wrong", MALFORMED)
def test_a_malformed_folder_is_one_sentence(wrong: str, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    MALFORMED[wrong](folder)
    before, started = peak(), time.monotonic()
    result = generate(folder, tmp_path / "clip.mp4")
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert all(c.isprintable() for c in lines[0]), "a terminal would obey it"
    assert "Traceback" not in result.output
    assert not (tmp_path / "clip.mp4").exists()
    assert time.monotonic() - started < MOST_SECONDS
    assert peak() - before < MOST_MEMORY


def test_nothing_of_the_folder_is_imported(sound: Path, tmp_path: Path, monkeypatch) -> None:
    import json

    folder = tmp_path / "inside"
    shutil.copytree(sound, folder)
    (folder / "__init__.py").touch()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(tmp_path))
    index = json.loads((folder / "model_index.json").read_text())
    for library in ("evil", "inside.evil", "inside"):
        index["vae"] = [library, "X"]
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ModelUnavailableError, match="vae"):
            load_pipeline(folder, device="cpu")
    assert not (tmp_path / "ran").exists()
    assert "evil" not in sys.modules
    assert "inside.evil" not in sys.modules
