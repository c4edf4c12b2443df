"""Options in a file, what a run used, JSON and silence."""

from __future__ import annotations

import json
import sys
import webbrowser
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from svg_models.cli import app
from svg_models.cli.config import option_names, read_config, write_config
from svg_models.errors import SettingError
from svg_models.generation.request import CompareRequest, GenerateRequest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--size", "48x48", "--frames", "5", "--steps", "2", "--guidance", "2"]
KNOWN = option_names(GenerateRequest)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.pipeline().save_pretrained(path)
    return str(path)


def generate(*words: str) -> dict:
    result = CliRunner().invoke(app, ["generate", *words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_file_gives_what_the_line_leaves_out(folder: str, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'prompt = "a red circle"\nmodel = "{folder}"\nsize = "48x32"\nnum-frames = 5\n'
        'steps = 2\nguidance_scale = 2\nseed = 7\nmethod = "dense"\n'
    )
    words = ["--config", str(config), "-o", str(tmp_path / "clip.mp4")]
    settings = generate(*words)["settings"]
    assert (settings["width"], settings["height"], settings["frames"]) == (48, 32, 5)
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("a red circle", 7, 2)
    again = generate("a green square", *words, "--seed", "0", "--steps", "1")["settings"]
    assert (again["prompt"], again["seed"], again["steps"]) == ("a green square", 0, 1)


def test_a_name_that_is_no_utf8_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "used.toml"
    with pytest.raises(SettingError, match=r"TOML is UTF-8, .* holds '\\udcff'"):
        write_config({"image": "a\udcff.png"}, str(file))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("stepz = 3", "no setting 'stepz'; did you mean 'steps'"),
        ("steps = 2.5", "steps must be a whole number, got 2.5"),
        ("steps = '3'", "steps must be a whole number, got '3'"),
        ("steps = true", "steps must be a whole number, got True"),
        ("steps = 3\nnum_inference_steps = 3", "are the same setting"),
        ("prompt = 3", "prompt must be a text, got 3"),
        ("compile = 'yes'", "compiled must be true or false"),
        ("lora = 'a.safetensors'", "loras must be a list of texts"),
        ("guidance = nan", "guidance must be a finite number"),
        ("seed = 99999999999999999999", "seed must be at most"),
        ("steps = ", "cannot read"),
        ("[a]\nb = 1", "no setting 'a'"),
        ("a" * 10, "cannot read"),
        ("", ""),
    ],
)
def test_a_file_is_checked_as_the_line_is(content: str, sentence: str, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(content or "# nothing\n")
    if not sentence:
        assert read_config(str(config), KNOWN) == {}
        return
    result = CliRunner().invoke(app, ["generate", "--config", str(config), "--device", "mps"])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert sentence in line


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    for path in ("/dev/zero", str(tmp_path), str(tmp_path / "missing.toml")):
        with pytest.raises(SettingError, match="as a configuration"):
            read_config(path, KNOWN)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    values = {
        "prompt": 'quotes " and \\ and\nlines, \x7f, \x1b, 中文, 👩‍🔬',
        "steps": 3,
        "guidance": 2.5,
        "compiled": True,
        "loras": ["a/b:0.5", "c/d"],
        "size": "48x48",
    }
    write_config(values, str(tmp_path / "used.toml"))
    assert tomllib.loads((tmp_path / "used.toml").read_text(encoding="utf-8")) == values
    assert read_config(str(tmp_path / "used.toml"), KNOWN) == values


def test_what_a_run_used_repeats_it(folder: str, tmp_path: Path) -> None:
    used, one, two = (str(tmp_path / name) for name in ("used.toml", "one.mp4", "two.mp4"))
    first = generate("a red circle", "-m", folder, *SMALL, "-o", one, "--save-config", used)
    second = generate("--config", used, "-o", two)
    assert first["settings"] == second["settings"]
    assert Path(one).read_bytes() == Path(two).read_bytes()


def test_json_and_silence(folder: str, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    words = ["generate", "a red circle", "-m", folder, *SMALL, "-o", str(path)]
    loud = CliRunner().invoke(app, words)
    assert "5 frames of 48 x 48" in loud.stderr
    assert "note:" in loud.stderr
    quiet = CliRunner().invoke(app, [*words, "--quiet"])
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, f"{path}\n", "")
    values = json.loads(CliRunner().invoke(app, [*words, "--json", "-q"]).stdout)
    assert values["path"] == str(path)
    assert values["model"] == folder
    assert values["attention"]["mean_density"] == 1.0
    assert values["messages"]


def test_a_comparison_as_json_and_in_the_browser(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: bool(opened.append(address)))
    words = ["compare", "a red circle", "-m", folder, *SMALL, "--method", "random@0.5"]
    words += ["-o", str(tmp_path / "out"), "--open", "--json"]
    words += ["--save-config", str(tmp_path / "used.toml")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [run["name"] for run in values["runs"]] == ["dense", "random-50"]
    assert opened == [(tmp_path / "out" / "index.html").as_uri()]
    assert "no browser was found" in result.stderr
    known = option_names(CompareRequest)
    assert read_config(str(tmp_path / "used.toml"), known)["methods"] == ["random@0.5"]


def test_a_flag_does_not_swallow_the_prompt(folder: str, tmp_path: Path) -> None:
    output = ["-o", str(tmp_path / "clip.mp4"), "-m", folder, *SMALL, "--method", "dense"]
    assert (
        generate("--compensate", "--method", "svg2", "a red circle", *output[:-2])["settings"][
            "prompt"
        ]
        == "a red circle"
    )
    result = CliRunner().invoke(app, ["generate", "--compile", "a b", "--offload", "group"])
    assert "this runs on the CPU" in result.stderr or "compiled blocks cannot" in result.stderr


@pytest.mark.parametrize(
    "command", ["", "generate", "compare", "batch", "tune", "models", "doctor"]
)
def test_help_names_no_types(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = CliRunner().invoke(app, [*command.split(), "--help"]).stdout
    assert "Examples" in text or command in ("", "doctor")
    for noise in ("<str>", "<bool>", "<int>", "<float>", "TEXT", "INTEGER"):
        assert noise not in text
