"""One clip by several processes on the CPU: the same clip, or one sentence and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from processes import children, gone, run_ranks
from typer.testing import CliRunner

import svg_models
from svg_models.cli import app
from svg_models.errors import MachineError, SettingError, about_memory
from svg_models.generation import ranks
from svg_models.generation.ranks import places_of
from svg_models.generation.request import GenerateRequest
from svg_models.loading import device
from svg_models.video import mp4, read_video, similarity

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]
SMALL: dict[str, Any] = {"height": 48, "width": 48, "frames": 9, "steps": 3, "guidance": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.pipeline().save_pretrained(path)
    return str(path)


def test_generate_gpus_makes_the_clip_of_one_process(folder: str) -> None:
    stages: list[str] = []
    asked = SMALL | {"model": folder, "method": "svg2@0.4", "device": "cpu", "seed": 7}
    alone = svg_models.generate("a red circle", **asked)
    both = svg_models.generate(
        "a red circle", **asked, gpus=2, progress=lambda stage, *_: stages.append(stage)
    )
    assert (alone.gpus, both.gpus) == (1, 2)
    assert both.settings == alone.settings
    assert both.frames.shape == (9, 48, 48, 3)
    assert similarity(alone.frames, both.frames).worst_psnr > 50
    assert both.stats.sparse_calls == alone.stats.sparse_calls > 0
    assert stages.count("decoding") == 1, "rank 0 alone reports"
    assert json.loads(json.dumps(both.to_dict(), default=str))["gpus"] == 2
    assert children(os.getpid()) == set()


@pytest.mark.slow
def test_clips_are_shared_however_their_model_is_placed() -> None:
    distances = json.loads(run_ranks("placed.py").splitlines()[-1])
    assert set(distances) == {"whole", "model", "group", "compiled"}
    for name, found in distances.items():
        assert max(found) < 1e-4, name


def test_generate_gpus_raises_what_a_process_refuses(folder: str) -> None:
    with pytest.raises(SettingError, match=r"3 ranks cannot share the 2 heads .* use fewer --gpus"):
        svg_models.generate(model=folder, device="cpu", gpus=3, **SMALL)
    assert children(os.getpid()) == set()


def test_generate_gpus_refuses_beside_what_it_cannot_share() -> None:
    with pytest.raises(SettingError, match="device cuda:1 is one GPU, and 2 were asked for"):
        GenerateRequest(gpus=2, device="cuda:1")
    with pytest.raises(SettingError, match="gpus 2 was given beside a pipeline that is loaded"):
        GenerateRequest(gpus=2, model=SimpleNamespace(geometry=None))  # as a LoadedPipeline
    with pytest.raises(SettingError, match="gpus must be 1 or more"):
        GenerateRequest(gpus=0)


def test_memory_that_is_not_enough_names_the_gpu_as_people_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(request: GenerateRequest) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. GPU 0 has 79 GiB\nand more lines")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(MachineError, match=r"GPU 3 was not enough \(CUDA out of .* 79 GiB\); take"):
        ranks._naming_its_gpu(full)(GenerateRequest())


@pytest.mark.parametrize(
    ("asked", "spare", "setting", "advised"),
    [
        ("3.41 GiB", "2.14 GiB", None, True),
        ("3.41 GiB", "2140.00 MiB", None, True),
        ("3.41 GiB", "512.00 MiB", None, False),
        ("3.41 GiB", "2.14 GiB", "backend:cudaMallocAsync", False),  # somebody chose
    ],
)
def test_about_memory_says_what_helps_where_it_is_in_pieces(
    monkeypatch: pytest.MonkeyPatch, asked: str, spare: str, setting: str | None, advised: bool
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    if setting is not None:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", setting)
    error = torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {asked}. GPU 0 has a total capacity of 23.50 GiB. "
        f"17.52 GiB is allocated by PyTorch, and {spare} is reserved by PyTorch but unallocated."
    )
    told = about_memory(error)
    assert told.startswith(f"CUDA out of memory. Tried to allocate {asked}.")
    assert told.endswith(
        "so set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True and try again"
    ) is (advised)


@pytest.mark.parametrize(
    ("nodes", "chosen", "names"),
    [
        (4, None, ["0", "1"]),
        (4, "3,1", ["3", "1"]),
        (4, "GPU-1a,GPU-2b,GPU-3c", ["GPU-1a", "GPU-2b"]),
        (1, None, "there is 1 here"),
        (0, None, "there are none here"),
        (4, "2", "there is 1 here"),
        (4, "", "there are none here"),
        (4, "1,9,2", "there is 1 here"),
        (4, "-1,0", "there are none here"),
    ],
)
def test_places_are_the_gpus_that_cuda_would_show(
    nodes: int, chosen: str | None, names: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in (*(f"nvidia{n}" for n in range(nodes)), "nvidiactl", "nvidia-uvm"):
        (tmp_path / node).touch()
    monkeypatch.setattr(device, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    request = GenerateRequest(gpus=2)
    if isinstance(names, str):
        with pytest.raises(MachineError, match=f"2 GPUs were asked for, and {names}"):
            places_of(request)
        return
    found = [place.environment["CUDA_VISIBLE_DEVICES"] for place in places_of(request)]
    assert found == names


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="there may be enough GPUs")
def test_svg_generate_too_few_gpus_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys; from svg_models.cli import app\n"
        "try: app()\nfinally: print('torch' in sys.modules)"
    )
    words = ["generate", "--gpus", "2", "-o", str(tmp_path / "clip.mp4")]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == "False\n"
    (line,) = done.stderr.strip().splitlines()
    assert "2 GPUs were asked for, and there are none here; use --device cpu" in line


def test_svg_generate_gpus_keeps_a_clip_that_finds_no_room(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, disk = mp4.encode, tmp_path / "disk"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fails(frames: Any, target: Any, **how: Any) -> None:
        if isinstance(target, Path) and target.is_relative_to(disk):
            raise OSError(28, "No space left on device")
        encode(frames, target, **how)

    monkeypatch.setattr(mp4, "encode", fails)
    words = ["-m", folder, "--size", "48x48", "--frames", "5", "--steps", "1", "--device", "cpu"]
    result = CliRunner().invoke(
        app, ["generate", *words, "--gpus", "2", "-q", "-o", str(disk / "clip.mp4")]
    )
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    kept = re.search(r"no space left on device\); the clip is kept as (\S+\.mp4)", line)
    assert kept is not None, line
    assert Path(kept[1]).is_file()
    assert list(disk.iterdir()) == []
    assert children(os.getpid()) == set()


def test_svg_generate_gpus_goes_with_the_other_options(folder: str, tmp_path: Path) -> None:
    config, out = tmp_path / "config.toml", tmp_path / "out"
    config.write_text(
        f'model = "{folder}"\ngpus = 2\ndevice = "cpu"\nsteps = 2\nframes = 5\nsize = "48x48"\n'
    )
    words = ["--method", "svg2@0.5", "--seed", "3", "-o", str(out / "clip.mp4"), "--json", "-q"]
    words += ["--save-config", str(out / "used.toml"), "--save-recipe", str(out / "recipe.json")]
    result = CliRunner().invoke(app, ["generate", "--config", str(config), *words])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["gpus"], facts["settings"]["seed"]) == (2, 3)
    assert facts["attention"]["mean_density"] < 1
    assert result.stderr == ""
    assert "gpus = 2" in (out / "used.toml").read_text().splitlines()
    again = ["--config", str(out / "used.toml"), "--gpus", "1", "-o", str(out / "again.mp4"), "-q"]
    assert CliRunner().invoke(app, ["generate", *again]).exit_code == 0
    one, two = (read_video(out / name)[0] for name in ("again.mp4", "clip.mp4"))
    assert similarity(one, two).worst_psnr > 40, "after the codec"
    from svg_models import Recipe

    assert Recipe.read(out / "recipe.json").method.density == 0.5


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("offload", "guidance"), [("none", None), ("none", 1.0), ("model", None), ("group", None)]
)
def test_generate_gpus_on_two_gpus(offload: str, guidance: float | None) -> None:
    # With guidance each GPU computes a branch; without, both share the sequence.
    asked: dict[str, Any] = {"method": "svg2@0.5", "steps": 10, "seed": 1, "offload": offload}
    asked |= {} if guidance is None else {"guidance": guidance}
    alone = svg_models.generate(**asked, device="cuda")
    both = svg_models.generate(**asked, gpus=2)
    assert both.gpus == 2
    found = similarity(alone.frames, both.frames)
    seconds = f"{alone.seconds:.2f} s and {both.seconds:.2f} s"
    print(f"{offload}, guidance {guidance}: {found.mean_psnr:.1f} dB, {seconds}")
    assert found.mean_psnr > 30  # bf16 sums in another order


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_svg_batch_on_two_gpus(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("a red circle\na green square\na blue circle\n")
    words = [str(lines), "--steps", "4", "-o", str(tmp_path / "out"), "--json", "-q"]
    for more in (["--gpus", "2"], ["--gpus", "2", "--gpus-per-clip", "2", "--seed", "1"]):
        result = CliRunner().invoke(app, ["batch", *words, *more])
        assert result.exit_code == 0, result.output
        assert [value["made"] for value in json.loads(result.stdout)] == [True] * 3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_svg_generate_a_killed_rank_of_two_gpus_is_told_within_seconds(tmp_path: Path) -> None:
    words = ["generate", "--gpus", "2", "--steps", "9000", "-o", str(tmp_path / "clip.mp4")]
    process = subprocess.Popen(
        [sys.executable, "-c", SAMPLING, str(tmp_path / "marker"), *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not (tmp_path / "marker").exists() and process.poll() is None:
            time.sleep(0.05)
        processes = children(process.pid)
        began = time.monotonic()
        os.kill(max(processes), signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
        took = time.monotonic() - began
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    print(f"{took:.1f} s: {stderr.strip().splitlines()[-1]}")
    assert process.returncode == 2
    assert re.search(r"the process of GPU \d+ \(rank \d of 2\) was ended by SIGKILL", stderr)
    assert took < 10
    assert gone(processes, within=0)


SAMPLING = """
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


@pytest.fixture
def sampling(folder: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a command of two processes over a clip that is there, and wait until they sample."""
    marker, clip = tmp_path / "marker", tmp_path / "out" / "clip.mp4"
    clip.parent.mkdir()
    clip.write_text("the clip of the run before")
    words = ["generate", "-m", folder, "--size", "48x48", "--frames", "9", "--steps", "9000"]
    words += ["--method", "dense", "--device", "cpu", "--gpus", "2", "-o", str(clip)]
    process = subprocess.Popen(
        [sys.executable, "-c", SAMPLING, str(marker), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert marker.exists(), process.communicate(timeout=5)
        yield process
        assert clip.read_text() == "the clip of the run before"
        assert [path.name for path in clip.parent.iterdir()] == ["clip.mp4"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_svg_generate_a_killed_rank_is_one_sentence(sampling: subprocess.Popen[str]) -> None:
    processes = children(sampling.pid)
    assert len(processes) == 2
    began = time.monotonic()
    os.kill(max(processes), signal.SIGKILL)
    stdout, stderr = sampling.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert (sampling.returncode, stdout) == (2, ""), stderr
    last = stderr.strip().splitlines()[-1]
    assert re.match(
        r"error: process [01] \(rank [01] of 2\) was ended by SIGKILL while "
        r"sampling, \d+ of 9000: ",
        last,
    ), stderr
    assert "Traceback" not in stderr
    assert gone(processes, within=0)


@pytest.mark.parametrize("whom", ["group", "parent"])
def test_svg_generate_ctrl_c_ends_all_processes(whom: str, sampling: subprocess.Popen[str]) -> None:
    processes = children(sampling.pid)
    assert len(processes) == 2
    (os.killpg if whom == "group" else os.kill)(sampling.pid, signal.SIGINT)
    stdout, stderr = sampling.communicate(timeout=60)
    assert (sampling.returncode, stdout) == (130, ""), stderr
    assert stderr.strip().splitlines()[-1] == "stopped: nothing was written"
    assert "Traceback" not in stderr
    assert gone(processes, within=0)
