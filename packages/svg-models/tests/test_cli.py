"""The command line: sentences, exit codes, files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import Result
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from typer.testing import CliRunner

from svg_models import embedded_path
from svg_models.cli import app
from svg_models.cli.progress import Lines
from svg_models.loading import Geometry
from svg_models.video import read_video, write_video

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--size", "48x48", "--frames", "9", "--steps", "5", "--guidance", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.pipeline().save_pretrained(path)
    return str(path)


def svg(*words: str) -> Result:
    os.environ["COLUMNS"] = "200"
    return CliRunner().invoke(app, list(words))


def refusal(*words: str) -> str:
    """Run a command that must end with exit code 2 and one sentence; return the sentence."""
    result = svg(*words)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    return lines[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--steps", "-3"], "steps must be 1 or more, got -3"),
        (["--steps", "0"], "steps must be 1 or more, got 0"),
        (["--seed", "-1"], "seed must be 0 or more"),
        (["--guidance", "-1"], "guidance must be 0 or more"),
        (["--guidance", "nan"], "guidance must be a finite number"),
        (["--fps", "0"], "fps must be above 0"),
        (["--size", "480"], "size is WIDTHxHEIGHT in pixels, such as 832x480, got '480'"),
        (["--density", "1.5"], "density must be above 0 and at most 1, got 1.5"),
        (["--density", "0"], "density must be above 0"),
        (["--top-p", "2"], "top-p must be above 0 and at most 1"),
        (["--top-p", "0.9", "--density", "0.3"], "give one of them"),
        (["--method", "svg3"], "method must be one of auto, dense, svg1, svg2"),
        (["--method", "svg2@lots"], "expected a density after '@'"),
        (["--method", "svg1", "--top-p", "0.5"], "top-p belongs to the svg2 methods"),
        (["--method", "svg1", "--compensate"], "only the svg2 methods can compensate"),
        (["--output", "clip.gif"], "clips are written as mp4, got 'clip.gif'"),
        (["--device", "toaster"], "device must be auto, cpu, cuda or cuda:N, got 'toaster'"),
        (["--dtype", "int4"], "dtype must be one of auto, float32"),
        (["--offload", "disk"], "offload must be one of none, model, group, sequential"),
        (["--offload", "model", "--device", "cpu"], "this runs on the CPU; leave --offload out"),
        (["--strength", "0"], "strength must be above 0"),
        (["--strength", "1.2"], "strength must be at most 1, got 1.2"),
        (["--image", "no.png"], "cannot read no.png as an image (no such file or directory)"),
        (["--video", "no.mp4"], "cannot read no.mp4 as a video"),
        (["--lora", "no.safetensors:0.8"], "no LoRA at 'no.safetensors'"),
    ],
)
def test_generate_refuses_bad_options_before_it_loads(
    options: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal("generate", "--model", "no/such", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--method", "dense"], "dense is always part of a comparison"),
        (["--method", "svg2", "--method", "svg2"], "compared once, got svg2-25 more than once"),
        (["--density", "-0.1"], "density must be above 0"),
        (["--method", "svg1@7"], "density must be above 0 and at most 1, got 7"),
    ],
)
def test_compare_refuses_bad_methods(options: list[str], sentence: str, tmp_path: Path) -> None:
    assert sentence in refusal("compare", *options, "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--size", "50x64"], "must be multiples of 16, got 64 x 50; the nearest"),
        (["--size", "50x64"], "nearest valid size is 64 x 48"),
        (["--size", "1x1"], "nearest valid size is 16 x 16"),
        (["--frames", "10"], "frames must be a multiple of 4 plus 1, got 10; the nearest"),
        (["--frames", "10"], "nearest valid number is 9"),
        (["--backend", "abacus"], "backend must be one of auto, "),
    ],
)
def test_generate_refuses_what_the_model_would_round(
    options: list[str], sentence: str, folder: str, tmp_path: Path
) -> None:
    output = tmp_path / "clip.mp4"
    words = ["--model", folder, *SMALL, "-o", str(output), *options]
    assert sentence in refusal("generate", "a red circle", *words)
    assert not output.exists()


def test_generate_an_unwritable_path_is_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    inside = str(tmp_path / "file" / "clip.mp4")
    assert "choose a folder that can be written" in refusal("generate", "-m", folder, "-o", inside)
    assert "choose a folder" in refusal("compare", "-m", folder, "-o", inside)
    (tmp_path / "taken.mp4").mkdir()
    sentence = refusal("generate", "-m", folder, "-o", str(tmp_path / "taken.mp4"))
    assert "got the folder" in sentence


def test_generate_unknown_models_are_refused(tmp_path: Path) -> None:
    output = ["-o", str(tmp_path / "clip.mp4")]
    assert "unknown model 'nonsense'" in refusal("generate", "-m", "nonsense", *output)
    missing = str(tmp_path / "missing")
    assert "an existing folder" in refusal("generate", "-m", missing, *output)
    (tmp_path / "empty").mkdir()
    sentence = refusal("generate", "-m", str(tmp_path / "empty"), *output)
    assert "it has no model_index.json" in sentence


def write_index(place: Path, transformer: str, config: dict[str, Any]) -> str:
    (place / "transformer").mkdir(parents=True)
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", transformer]}
    (place / "model_index.json").write_text(json.dumps(index))
    config: dict[str, Any] = {"_class_name": transformer, "_diffusers_version": "0.42.0", **config}
    (place / "transformer" / "config.json").write_text(json.dumps(config))
    return str(place)


def test_generate_a_family_nobody_knows_is_refused(tmp_path: Path) -> None:
    model = write_index(tmp_path / "flux", "FluxTransformer2DModel", {})
    sentence = refusal("generate", "-m", model, "-o", str(tmp_path / "clip.mp4"))
    assert "has FluxTransformer2DModel as its transformer, which no model family covers" in sentence
    assert "wan (Wan 2.1" in sentence


def test_generate_a_checkpoint_that_its_family_objects_to_is_refused(tmp_path: Path) -> None:
    config: dict[str, Any] = {"num_layers": 1, "ffn_dim": 8, "num_frame_per_block": 3}
    model = write_index(tmp_path / "causal", "SkyReelsV2Transformer3DModel", config)
    sentence = refusal("generate", "-m", model, "-o", str(tmp_path / "clip.mp4"))
    assert "SkyReelsV2Transformer3DModel stays dense: " in sentence
    assert "causal" in sentence.split("stays dense")[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_generate_a_14b_model_without_a_gpu_is_refused(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "num_layers": 40,
    }
    model = write_index(tmp_path / "wan14b", "WanTransformer3DModel", config | {"ffn_dim": 13824})
    output = ["-o", str(tmp_path / "clip.mp4")]
    sentence = refusal("generate", "-m", model, *output)
    assert "14.3 billion parameters and needs a CUDA GPU with about 27 GiB" in sentence
    assert "torch sees no CUDA GPU" in refusal("generate", "-m", model, "--device", "cuda", *output)


def test_generate_a_model_larger_than_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: dict[str, Any] = {
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "num_layers": 30,
    }
    model = write_index(tmp_path / "wan", "WanTransformer3DModel", config | {"ffn_dim": 8960})
    monkeypatch.setattr("svg_models.loading.memory.machine_memory", lambda: 2 * 1024**3)
    words = ["-m", model, "--device", "cpu", "-o", str(tmp_path / "clip.mp4")]
    sentence = refusal("generate", *words)
    assert "1.4 billion parameters, whose weights take 5.3 GiB in float32" in sentence
    assert "has 2.0 GiB of memory" in sentence


def test_generate_without_a_network_one_sentence_says_what_was_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    output = ["-o", str(tmp_path / "clip.mp4")]
    model = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sentence = refusal("generate", "-m", model, *output)
    assert f"to fetch {model}, and it is not in the local cache" in sentence
    assert "HF_HUB_OFFLINE is set" in sentence

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    sentence = refusal("generate", "-m", model, *output)
    assert "could not reach http://127.0.0.1:9 to fetch" in sentence
    assert time.monotonic() - started < 30


def test_generate_writes_the_clip(folder: str, tmp_path: Path) -> None:
    output = tmp_path / "new" / "clip.mp4"
    options = ["--method", "svg2-error", "--density", "0.4", "--fps", "12"]
    result = svg("generate", "a red circle", "-m", folder, *SMALL, *options, "-o", str(output))
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(output)
    assert "SVG2 + compensation + error routing, density" in result.stderr
    frames, fps = read_video(output)
    assert frames.shape == (9, 48, 48, 3)
    assert fps == 12
    assert [p.name for p in output.parent.iterdir()] == ["clip.mp4"]


def test_generate_the_embedded_model_redraws_a_video_with_a_lora(tmp_path: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(embedded_path(), subfolder="transformer")
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = get_peft_model_state_dict(transformer)
    WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    write_video(np.full((12, 40, 60, 3), 90, np.uint8), tmp_path / "grey.mp4", fps=16)

    words = ["--video", str(tmp_path / "grey.mp4"), "--strength", "0.5", "--steps", "4"]
    words += ["--size", "64x64", "--density", "0.5"]
    clips = []
    for lora in ([], ["--lora", f"{tmp_path}:0.5"]):
        output = str(tmp_path / f"{len(lora)}.mp4")
        result = svg("generate", "a red circle", *words, *lora, "-o", output)
        assert result.exit_code == 0, result.output
        clips.append(read_video(output)[0])
    assert clips[0].shape == (9, 64, 64, 3), "12 frames give 9"
    assert (clips[0] != clips[1]).any()


def test_generate_an_image_for_a_model_that_takes_none_is_refused(
    folder: str, tmp_path: Path
) -> None:
    Image.new("RGB", (48, 48)).save(tmp_path / "black.png")
    words = ["--image", str(tmp_path / "black.png"), "-o", str(tmp_path / "clip.mp4")]
    for command in ("generate", "compare"):
        sentence = refusal(command, "-m", folder, *words)
        assert "cannot start from an image (WanPipeline takes none); leave --image out" in sentence


def test_compare_writes_the_page_the_numbers_and_the_clips(folder: str, tmp_path: Path) -> None:
    place = tmp_path / "out"
    methods = ["--method", "svg2@0.3", "--method", "random@0.3"]
    result = svg("compare", "a red circle", "-m", folder, *SMALL, *methods, "-o", str(place))
    assert result.exit_code == 0, result.output
    assert f"page: {place / 'index.html'}" in result.stdout
    assert {p.name for p in place.iterdir()} == {
        "compare.json",
        "dense.mp4",
        "index.html",
        "random-30.mp4",
        "side-by-side.mp4",
        "svg2-30.mp4",
    }
    numbers = json.loads((place / "compare.json").read_text())
    assert [run["name"] for run in numbers["runs"]] == ["dense", "svg2-30", "random-30"]
    assert "a red circle" in (place / "index.html").read_text()


INTERRUPTED = """
import sys
from pathlib import Path
from svg_models.cli import app
from svg_models.cli.progress import Lines

marker = Path(sys.argv.pop(1))
show = Lines.__call__

def noted(self, stage, done, total):
    show(self, stage, done, total)
    if stage == "sampling" and done >= 1:
        marker.touch()

Lines.__call__ = noted
app()
"""


def test_generate_leaves_nothing_behind_at_ctrl_c(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = Lines.__call__

    def interrupted(self: Lines, stage: str, done: float, total: float) -> None:
        show(self, stage, done, total)
        if stage == "sampling" and done >= 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Lines, "__call__", interrupted)
    result = svg("generate", "-m", folder, *SMALL, "-o", str(tmp_path / "clip.mp4"))
    assert result.exit_code == 130, result.output
    assert "stopped: nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_generate_a_run_stopped_from_outside_leaves_nothing_behind(
    folder: str, tmp_path: Path
) -> None:
    place, marker = tmp_path / "out", tmp_path / "marker"
    place.mkdir()
    words: Sequence[str] = [
        *(sys.executable, "-c", INTERRUPTED, str(marker), "generate", "-m", folder),
        *("--size", "48x48", "--frames", "9", "--steps", "900", "-o", str(place / "clip.mp4")),
    ]
    process = subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert marker.exists(), stderr
    assert process.returncode == 130, stderr
    assert "stopped: nothing was written" in stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    assert list(place.iterdir()) == []


def test_help_shows_examples_and_panels() -> None:
    output = svg("generate", "--help").stdout
    assert "Examples" in output
    assert "Wan-AI/Wan2.1-T2V-14B-Diffusers" in output
    assert all(panel in output for panel in ("What to generate", "Attention", "Machine and output"))
    assert "svg compare --method svg2@0.2" in svg("compare", "--help").stdout


def test_version_names_the_packages() -> None:
    import svg_models

    assert f"svg-models {svg_models.__version__}" in svg("--version").stdout


def test_geometry_counts_the_tokens_that_the_transformer_sees() -> None:
    pipe = tiny.pipeline()
    geometry = Geometry.of(pipe)
    assert geometry.multiple == 16
    assert geometry.tokens(height=48, width=48, frames=9) == 3 * 12 * 12
    latents = tiny.generate(pipe, num_inference_steps=1)
    assert tuple(latents.shape[2:]) == tiny.GRID
