"""Many clips of one model: read, checked, made once, and gone on with."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from svg_models.cli import app
from svg_models.errors import MachineError, SettingError
from svg_models.generation import batch, sample
from svg_models.generation.batch import read_lines

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--size", "48x48", "--frames", "5", "--steps", "2", "--guidance", "2", "--method", "dense"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.pipeline().save_pretrained(path)
    return str(path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the prompts of the clips that are made."""
    prompts: list[str] = []
    original = sample.sample

    def counted(loaded: Any, settings: Any, *rest: Any, **how: Any) -> Any:
        prompts.append(settings.prompt)
        return original(loaded, settings, *rest, **how)

    monkeypatch.setattr(sample, "sample", counted)
    return prompts


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["batch", *words])


def test_lines_of_text_and_of_json(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("\ufeffa red circle\n\n# a note\n  a green square  \n", encoding="utf-8")
    expected = [(1, {"prompt": "a red circle"}), (4, {"prompt": "a green square"})]
    assert read_lines(str(text)) == expected
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a", "seed": 3}\n\n{}\n')
    assert read_lines(str(lines)) == [(1, {"prompt": "a", "seed": 3}), (3, {})]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "the file is empty"),
        ("\n\n", "holds no prompt"),
        ("{", "line 1: no JSON"),
        ("[1]", "line 1: expected an object"),
        ('{"prompt": "a"}\n' + "[" * 100_000, "line 2: no JSON"),
        ('{"stepz": 3}', "no setting 'stepz'; did you mean 'steps'"),
        ('{"steps": 2.5}', "line 1: steps must be a whole number, got 2.5"),
        ('{"seed": -1}', "line 1: seed must be 0 or more"),
        ('{"prompt": 3}', "prompt must be a text"),
        ('{"prompt": "a", "seed": 1, "seed": 2}', "line 1: no JSON ('seed' stands there twice)"),
        ('{"prompt": "\\ud800 a"}', "line 1: prompt must be text in UTF-8, got '\\ud800' at"),
        ('{"guidance": NaN}', "line 1: no JSON (NaN is no JSON)"),
        ('{"image": "/etc/passwd"}\n{"image": "no.png"}', "line 2: cannot read no.png as an image"),
        ('{"device": "cpu"}', "device holds for the whole batch"),
        ('{"model": "a/b"}', "model holds for the whole batch"),
        ('{"size": "large"}', "size is WIDTHxHEIGHT"),
        ('{"method": "svg3"}', "line 1: method must be one of"),
        ('{"video": "PROMPTS"}\n{}', "line 2: all clips of a batch start from videos, or none"),
    ],
)
def test_every_line_is_checked_before_the_first_clip(
    content: str, sentence: str, tmp_path: Path
) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(content.replace("PROMPTS", str(lines)))
    result = run(str(lines), "-o", str(tmp_path / "out"))
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert sentence in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("between", ["\u2028", "\x85", "\x0b", "\x0c", "\x1e"])
def test_a_line_ends_where_files_end_them_and_nowhere_else(between: str, tmp_path: Path) -> None:
    prompt = f"a red{between}circle"
    text = tmp_path / "prompts.txt"
    text.write_bytes(f"{prompt}\r\nanother\rthird\n".encode())
    expected = [(1, {"prompt": prompt}), (2, {"prompt": "another"}), (3, {"prompt": "third"})]
    assert read_lines(str(text)) == expected
    if between in "\u2028\x85":  # the others stand in JSON as escapes alone
        lines = tmp_path / "prompts.jsonl"
        lines.write_text(json.dumps({"prompt": prompt}, ensure_ascii=False), encoding="utf-8")
        assert read_lines(str(lines)) == [(1, {"prompt": prompt})]


@pytest.mark.parametrize(
    "facts",
    [
        "[1]",
        "[{}]",
        "[" * 100_000,
        "null",
        '{"asked": 1}',
        {"attention": "x"},
        {"attention": None},
        {"attention": {"mean_density": "x"}},
        {"seconds": "x"},
        {"seconds": None},
        "clip",
    ],
)
def test_a_clip_whose_files_somebody_spoiled_is_made_again(
    facts: Any, folder: str, tmp_path: Path, made: list[str]
) -> None:
    lines, out = tmp_path / "prompts.txt", tmp_path / "out"
    lines.write_text("a red circle\na green square\n")
    words = [str(lines), "-m", folder, *SMALL, "-o", str(out)]
    assert run(*words).exit_code == 0
    made.clear()
    file = out / "0001-a-red-circle.json"
    if facts == "clip":
        file.with_suffix(".mp4").write_bytes(b"\0" * 100)
    elif isinstance(facts, dict):
        file.write_text(json.dumps(json.loads(file.read_text()) | facts))
    else:
        file.write_text(facts)
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert made == ["a red circle"]


def test_a_line_more_leaves_the_clips_of_the_others(
    folder: str, tmp_path: Path, made: list[str]
) -> None:
    lines, out = tmp_path / "prompts.txt", tmp_path / "out"
    words = [str(lines), "-m", folder, *SMALL, "--steps", "1", "-o", str(out)]
    for prompts in (9, 10):
        made.clear()
        lines.write_text("".join(f"circle {n}\n" for n in range(prompts)))
        assert run(*words).exit_code == 0
    assert made == ["circle 9"]


def test_a_prompt_without_end_does_not_fill_the_terminal(folder: str, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("red " * 5000)
    result = run(str(lines), "-m", folder, *SMALL, "--steps", "1", "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert len(result.stdout) < 5000


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for path in ("/dev/zero", str(tmp_path), "missing.txt", str(tmp_path / "bytes.txt")):
        with pytest.raises(SettingError, match="as prompts"):
            read_lines(path)


def test_a_batch_is_made_once_and_gone_on_with(
    folder: str, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    rows = [{"prompt": "a red circle", "seed": 3}, {"prompt": "a green square", "size": "32x48"}]
    lines.write_text("\n".join(map(json.dumps, rows)))
    loads: list[int] = []
    load = sample.load_pipeline
    monkeypatch.setattr(sample, "load_pipeline", lambda *a, **k: loads.append(1) or load(*a, **k))
    words = [str(lines), "-m", folder, *SMALL, "-o", str(out)]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert made == ["a red circle", "a green square"]
    assert loads == [1]
    assert "contact sheet:" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "0001-a-red-circle.json",
        "0001-a-red-circle.mp4",
        "0002-a-green-square.json",
        "0002-a-green-square.mp4",
        "contact-sheet.jpg",
    ]
    second = json.loads((out / "0002-a-green-square.json").read_text())
    assert (second["settings"]["width"], second["settings"]["height"]) == (32, 48)
    assert Image.open(out / "contact-sheet.jpg").width > 2 * 320

    made.clear()
    assert run(*words).exit_code == 0
    assert made == []
    rows[0]["seed"] = 4
    lines.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "a blue circle"}])))
    values = json.loads(run(*words, "--json").stdout)
    assert made == ["a red circle", "a blue circle"]
    assert [value["made"] for value in values] == [True, False, True]
    assert [value["settings"]["seed"] for value in values] == [4, 0, 0]
    (out / "0002-a-green-square.mp4").unlink()
    made.clear()
    assert run(*words, "-q").exit_code == 0
    assert made == ["a green square"]


def test_a_clip_that_fails_is_told_and_passed_over(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, out = tmp_path / "prompts.txt", tmp_path / "out"
    lines.write_text("a red circle\na green square\n")
    original = sample.sample

    def failing(loaded: Any, settings: Any, *rest: Any, **how: Any) -> Any:
        if "red" in settings.prompt:
            raise MachineError("too much for this machine")
        return original(loaded, settings, *rest, **how)

    monkeypatch.setattr(sample, "sample", failing)
    result = run(str(lines), "-m", folder, *SMALL, "-o", str(out))
    assert result.exit_code == 2
    assert "line 1: too much for this machine" in result.stderr
    assert "1 of 2 clips failed" in result.stderr
    assert (out / "0002-a-green-square.mp4").is_file()
    assert not (out / "0001-a-red-circle.mp4").exists()


def test_a_batch_that_is_stopped_says_how_far_it_came(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, out = tmp_path / "prompts.txt", tmp_path / "out"
    lines.write_text("a red circle\na green square\n")
    write = batch.atomic_folder

    def stopped(place: Path) -> Any:
        if (out / "0001-a-red-circle.mp4").exists():
            signal.raise_signal(signal.SIGINT)
        return write(place)

    monkeypatch.setattr(batch, "atomic_folder", stopped)
    result = run(str(lines), "-m", folder, *SMALL, "-o", str(out))
    assert result.exit_code == 130
    assert "stopped: 1 of 2 clips are in" in result.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "0001-a-red-circle.json",
        "0001-a-red-circle.mp4",
    ]
