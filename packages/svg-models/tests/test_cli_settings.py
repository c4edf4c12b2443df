"""Settings of methods, schedules and schedulers on the command line."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from svg_attention import SVG2, Dense
from svg_attention.backends import BACKENDS
from svg_models import embedded_path
from svg_models.cli import app
from svg_models.cli import progress as progress_of_cli
from svg_models.cli.options import check_frames, check_multiple, latent_frame
from svg_models.cli.output import bars_on, err, show_note
from svg_models.cli.progress import Lines, PaceColumn, progress_bars
from svg_models.errors import SettingError
from svg_models.generation.conditioning import read_media
from svg_models.generation.generate import generate
from svg_models.generation.request import BACKEND_NAMES, CompareRequest, GenerateRequest
from svg_models.generation.settings import Settings
from svg_models.generation.shift import check_flow_shift, shifted
from svg_models.loading import LoadedPipeline, load_pipeline
from svg_models.loading.placement import OFFLOAD
from svg_models.recipes import choose_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"steps": 5, "guidance": 2.0, "height": 48, "width": 48, "frames": 9}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedPipeline:
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.pipeline().save_pretrained(path)
    return load_pipeline(path, device="cpu")


def refusal(*words: str) -> str:
    """Run a command as a person does; it must end with one sentence, before torch is imported."""
    began = time.process_time()
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 2, result.output
    assert time.process_time() - began < 1.0
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--q-clusters", "0"], "q_clusters must be 1 or more"),
        (["--q-clusters", "8", "--method", "svg1"], "q_clusters is for the svg2 methods"),
        (["--k-clusters", "8", "--method", "dense"], "k_clusters is for the svg2 methods"),
        (["--k-clusters", "8", "--preset", "fast"], "k_clusters is for the svg2 methods"),
        (["--dense-steps", "1.5"], "dense_steps must be at most 1"),
        (["--dense-layers", "-1"], "dense_layers must be 0 or more"),
        (["--dense-steps", "0.1", "--method", "dense"], "dense attention is dense throughout"),
        (["--flow-shift", "0"], "flow_shift must be above 0"),
        (["--last-image", "a.png"], "a last_image ends what an image begins"),
        (["--backend", "cude"], "did you mean 'cuda'?"),
        (["--size", "30x40"], "multiples of 16, got 40 x 30; the nearest valid size is 32 x 32"),
        (["--frames", "10"], "frames must be a multiple of 4 plus 1, got 10; the nearest"),
    ],
)
def test_generate_refuses_a_wrong_setting_at_once(options: list[str], sentence: str) -> None:
    assert sentence in refusal("generate", *options)


def test_generate_refuses_in_a_second_of_a_fresh_process() -> None:
    code = (
        "import sys\nfrom svg_models.cli import app\nsys.argv = ['svg', 'generate', '--backend', "
        "'cude', '--size', '31x31']\ntry:\n    app()\nfinally:\n"
        "    assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "did you mean" in done.stderr
    assert "AssertionError" not in done.stderr


def test_backend_names_and_choices_are_what_there_is() -> None:
    assert set(BACKEND_NAMES) == {"auto", *BACKENDS}
    assert set(OFFLOAD) == {"none", "model", "group", "sequential"}


def test_spec_settings_of_a_method_take_the_place_of_the_recipes() -> None:
    request = GenerateRequest(
        method="svg2@0.3", q_clusters=7, k_clusters=9, dense_steps=0.5, dense_layers=0.4
    )
    recipe = choose_recipe(request.spec, tiny.pipeline(), 5000)
    assert isinstance(recipe.method, SVG2)
    assert (recipe.method.q_clusters, recipe.method.k_clusters) == (7, 9)
    assert (recipe.schedule.dense_steps, recipe.schedule.dense_layers) == (0.5, 0.4)
    usual = choose_recipe(GenerateRequest(method="svg2@0.3").spec, tiny.pipeline(), 5000)
    assert isinstance(usual.method, SVG2)
    half = GenerateRequest(method="svg2@0.3", k_clusters=9).spec
    mixed = choose_recipe(half, tiny.pipeline(), 5000)
    assert isinstance(mixed.method, SVG2)
    assert (mixed.method.q_clusters, mixed.method.k_clusters) == (usual.method.q_clusters, 9)
    assert mixed.schedule == usual.schedule


def test_spec_clusters_alone_make_a_short_clip_sparse() -> None:
    short = choose_recipe(GenerateRequest().spec, tiny.pipeline(), 500)
    assert isinstance(short.method, Dense)
    asked = choose_recipe(GenerateRequest(q_clusters=4).spec, tiny.pipeline(), 500)
    assert isinstance(asked.method, SVG2)
    assert asked.method.q_clusters == 4


def test_specs_clusters_are_for_the_methods_that_have_any() -> None:
    request = CompareRequest(methods=["svg2@0.2", "svg1@0.3"], q_clusters=5, dense_steps=0.0)
    assert [(s.q_clusters, s.dense_steps) for s in request.specs] == [(5, 0.0), (None, 0.0)]
    with pytest.raises(SettingError, match="none is compared"):
        CompareRequest(methods=["svg1@0.3"], q_clusters=5)


def test_generate_keeps_as_many_steps_dense_as_asked(loaded: LoadedPipeline) -> None:
    clip = generate("a circle", model=loaded, method="svg2@0.4", dense_steps=0.6, **SMALL)
    table = clip.stats.grids
    assert table is not None
    assert table.dense.all(axis=1).tolist() == [True] * 3 + [False] * 2


def test_generate_the_embedded_model_is_sparse_without_an_option() -> None:
    from svg_models.loading.defaults import defaults_for

    pipe = tiny.pipeline()
    usual = defaults_for("embedded", pipe)
    assert usual.steps > 8, "few steps would stay dense"
    tokens = ((usual.frames - 1) // 4 + 1) * (usual.height // 8) * (usual.width // 8)
    recipe = choose_recipe(GenerateRequest().spec, pipe, tokens, num_steps=usual.steps)
    assert isinstance(recipe.method, SVG2)


def test_shifted_gives_the_scheduler_back(loaded: LoadedPipeline) -> None:
    own = loaded.pipe.scheduler
    with shifted(loaded, 7.0):
        assert loaded.pipe.scheduler is not own
        assert loaded.pipe.scheduler.config.flow_shift == 7.0
    assert loaded.pipe.scheduler is own
    assert own.config.flow_shift == 3.0
    usual = generate("a circle", model=loaded, method="dense", **SMALL)
    same = generate("a circle", model=loaded, method="dense", flow_shift=3.0, **SMALL)
    other = generate("a circle", model=loaded, method="dense", flow_shift=9.0, **SMALL)
    assert (usual.frames == same.frames).all()
    assert (usual.frames != other.frames).any()


def test_check_flow_shift_knows_other_schedulers(loaded: LoadedPipeline) -> None:
    own = loaded.pipe.scheduler
    try:
        loaded.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        with shifted(loaded, 5.0):
            assert loaded.pipe.scheduler.config.shift == 5.0
        loaded.pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        with pytest.raises(SettingError, match="by the size of the clip"):
            check_flow_shift(loaded)
        loaded.pipe.scheduler = type(own).from_config(own.config, use_flow_sigmas=False)
        with pytest.raises(SettingError, match="has none"):
            check_flow_shift(loaded)
    finally:
        loaded.pipe.scheduler = own


def test_last_image_reaches_the_pipeline(tmp_path: Path, loaded: LoadedPipeline) -> None:
    for name, colour in (("first", "red"), ("last", "blue")):
        Image.new("RGB", (64, 48), colour).save(tmp_path / f"{name}.png")
    media = read_media(tmp_path / "first.png", None, tmp_path / "last.png")

    class TakesImages:
        inputs = type("Inputs", (), {"image": "image", "video": ""})()

    settings = Settings(prompt="x", height=32, width=32)
    arguments = media.arguments(TakesImages(), settings)  # type: ignore[arg-type]
    assert arguments["last_image"].size == (32, 32)
    assert arguments["last_image"].getpixel((5, 5)) == (0, 0, 255)
    assert arguments["image"].getpixel((5, 5)) == (255, 0, 0)
    with pytest.raises(SettingError, match="image"):
        generate(
            "x",
            model=loaded,
            image=tmp_path / "first.png",
            last_image=tmp_path / "last.png",
            **SMALL,
        )


@pytest.mark.parametrize(
    ("line", "word", "found"),
    [
        ("svg generate --method sv", 3, {"svg1", "svg2", "svg2-comp", "svg2-error"}),
        ("svg generate --backend cu", 3, {"cuda", "cuda_fp8"}),
        ("svg generate --offload ", 3, set(OFFLOAD)),
        ("svg compare --preset ", 3, {"quality", "balanced", "fast"}),
        ("svg batch --dtype bf", 3, {"bfloat16"}),
    ],
)
def test_completion_offers_what_an_option_may_be(
    line: str, word: int, found: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_SVG_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(word))
    code = "import sys; sys.argv = ['svg']; from svg_models.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found <= set(done.stdout.split()), done.stderr


@pytest.mark.parametrize("words", [["--compile", "a fox"], ["a fox", "--compile"]])
def test_compile_never_takes_the_prompt(words: list[str]) -> None:
    command = typer.main.get_command(app).commands["generate"]  # type: ignore[attr-defined]
    values = command.make_context("generate", words).params
    assert (values["compiled"], values["prompt"]) == (True, "a fox")


def test_help_says_no_type_where_it_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "COLUMNS", "120")
    for command in ("generate", "compare", "batch"):
        text = CliRunner().invoke(app, [command, "--help"]).stdout
        for noise in ("<str>", "TEXT", "INTEGER", "FLOAT", "<int>", "<float>"):
            assert noise not in text, (command, noise)


def test_pace_is_told_from_the_first_step_on() -> None:
    clock = [0.0]
    bars = Progress(get_time=lambda: clock[0])
    task = bars.add_task("sampling", total=20)
    column = PaceColumn()
    assert column.render(bars.tasks[0]).plain == ""
    clock[0] = 4.0
    bars.update(task, completed=1)
    assert column.render(bars.tasks[0]).plain == "4.0 s/step, 1:16 left"
    bars.update(task, completed=16)
    assert column.render(bars.tasks[0]).plain == "4.0 steps/s, 0:01 left"


def test_pace_is_not_told_of_reports_that_come_together() -> None:
    clock = [0.0]
    bars = Progress(get_time=lambda: clock[0])
    task = bars.add_task("sampling", total=20)
    clock[0] = 3e-4
    for completed in (2, 20):
        bars.update(task, completed=completed)
        assert PaceColumn().render(bars.tasks[0]).plain == ""


def test_bars_cut_a_long_name_and_neither_pace_nor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, now = io.StringIO(), [0.0]
    monkeypatch.setattr(
        progress_of_cli, "err", lambda: Console(file=screen, force_terminal=True, width=92)
    )
    with progress_bars() as progress:
        bars = progress._bars
        bars.get_time = lambda: now[0]
        progress("2 of 3  " + "a long name " * 9 + ": sampling", 0, 20)
        now[0] = 14.8
        progress("2 of 3  " + "a long name " * 9 + ": sampling", 1, 20)
        bars.refresh()
        drawn = bars.console.render_lines(bars.get_renderable(), pad=False)
    (line,) = ("".join(segment.text for segment in line) for line in drawn)
    assert "… " in line
    assert line.rstrip().endswith("1/20 0:00:14 14.8 s/step, 4:41 left")


def test_lines_come_after_the_first_step_and_then_at_growing_intervals() -> None:
    clock, said = [0.0], []
    lines = Lines(said.append, now=lambda: clock[0])
    lines("reading the prompt", 0, 0)
    for step in range(201):
        lines("sampling", step, 200)
        clock[0] += 1.0
    lines("decoding", 0, 0)
    assert said[:4] == [
        "reading the prompt",
        "sampling: step 1 of 200, 1.0 steps/s, 3:19 left",
        "sampling: step 6 of 200, 1.0 steps/s, 3:14 left",
        "sampling: step 16 of 200, 1.0 steps/s, 3:04 left",
    ]
    steps = [int(line.split()[2]) for line in said[1:-1]]
    assert steps == [1, 6, 16, 36, 76, 136, 196]
    assert said[-1] == "decoding"


def test_lines_tell_no_pace_of_reports_that_come_together() -> None:
    clock, said = [0.0], []
    lines = Lines(said.append, now=lambda: clock[0])
    for step in range(4):
        lines("sampling", step, 4)
        clock[0] += 1e-5
    assert said == ["sampling: step 1 of 4"]


def test_lines_of_what_is_quick_are_left_out() -> None:
    clock, said = [0.0], []
    lines = Lines(said.append, now=lambda: clock[0])
    for part in (0, 10, 50, 100):
        lines("loading", part, 100)
        clock[0] += 1.0
    assert said == []
    lines("tuning", 0, 8)
    clock[0] += 30.0
    lines.named("[2]")("tuning", 0, 8)  # another stage: its own clock
    clock[0] += 5.0
    lines.named("[2]")("tuning", 2, 8)
    lines.named("1 of 2")("decoding", 0, 0)
    assert said == ["[2]: tuning: 25%, 0:15 left"]


def test_notes_stand_above_the_bars_and_keep_their_words_whole() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=40, color_system=None)
    with bars_on(console), Progress(console=console, transient=True) as bars:
        bars.add_task("sampling", total=2)
        bars.refresh()
        show_note("few steps are too few to make sparse here")
        assert err() is console
    assert err() is not console
    lines = re.sub(r"\x1b\[[?\d]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    assert "note: few steps are too few to make " in lines
    assert "sparse here" in lines


def test_generate_into_a_pipe_says_how_far_it_is_but_not_to_a_program(tmp_path: Path) -> None:
    clip = str(tmp_path / "clip.mp4")
    words = ["generate", "--size", "32x32", "--frames", "9", "--steps", "2", "-o", clip]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    assert "sampling: step 1 of 2" in told.stderr
    assert "decoding" in told.stderr.splitlines()
    for option in ("--quiet", "--json"):
        silent = CliRunner().invoke(app, [*words, option])
        assert silent.exit_code == 0, silent.output
        assert "sampling" not in silent.stderr


def test_generate_says_that_a_clip_stays_dense_before_it_samples(tmp_path: Path) -> None:
    words = ["--steps", "2", "--frames", "9", "--size", "32x32", "-o", str(tmp_path / "clip.mp4")]
    lines = CliRunner().invoke(app, ["generate", *words]).stderr.splitlines()
    (note,) = [number for number, line in enumerate(lines) if line.startswith("note: ")]
    (step,) = [number for number, line in enumerate(lines) if "step 1 of 2" in line]
    assert note < step


@pytest.mark.parametrize(
    ("option", "typed", "says"),
    [
        ("--seed", "1e3", "expected a whole number, got '1e3'"),
        ("--steps", "3.5", "expected a whole number, got '3.5'"),
        ("--density", "", "expected a number, got ''"),
        ("-o", "", "name it clip.mp4"),
    ],
)
def test_generate_says_what_a_number_must_be(option: str, typed: str, says: str) -> None:
    result = CliRunner().invoke(app, ["generate", option, typed])
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())


def test_latent_frame_reads_the_folder(tmp_path: Path) -> None:
    assert latent_frame(embedded_path()) == 4
    assert latent_frame(tmp_path) == 1
    (tmp_path / "vae").mkdir()
    for text in ("[1]", "{", '{"temporal_compression_ratio": "x"}'):
        (tmp_path / "vae" / "config.json").write_text(text)
        assert latent_frame(tmp_path) == 1
    check_frames(81, 4)
    check_multiple(480, 832)
    check_multiple(None, 30)
