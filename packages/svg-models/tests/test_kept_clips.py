"""A clip that was computed is never lost because it cannot be written where it should be."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import tiny
from typer.testing import CliRunner

from svg_models.cli import app
from svg_models.errors import OutputError, SettingError
from svg_models.generation.clip import Clip
from svg_models.generation.generate import generate
from svg_models.loading import LoadedPipeline, load_pipeline
from svg_models.video import mp4, read_video

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"height": 48, "width": 48, "frames": 5, "steps": 1, "method": "dense"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedPipeline:
    return load_pipeline(folder, device="cpu")


@pytest.fixture(scope="module")
def clip(loaded: LoadedPipeline) -> Clip:
    return generate("a red circle", model=loaded, **SMALL)


@pytest.fixture
def spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "spare"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def full(monkeypatch: pytest.MonkeyPatch, disk: Path) -> None:
    """Let every file of a folder fail as on a disk that is full."""
    encode = mp4.encode

    def fails(frames: Any, target: Any, **how: Any) -> None:
        if isinstance(target, Path) and target.is_relative_to(disk):
            raise OSError(28, "No space left on device")
        encode(frames, target, **how)

    monkeypatch.setattr(mp4, "encode", fails)


def test_a_clip_that_does_not_fit_is_kept_elsewhere(
    clip: Clip, spare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    full(monkeypatch, disk)
    with pytest.raises(OutputError, match="no space left on device") as caught:
        clip.save(disk / "clip.mp4")
    kept = Path(re.search(r"the clip is kept as (\S+\.mp4)", str(caught.value))[1])  # type: ignore[index]
    assert kept.parent == spare
    frames, _ = read_video(kept)
    assert np.abs(frames.astype(int) - clip.frames).mean() < 12
    assert list(disk.iterdir()) == []


def test_a_folder_that_was_removed_meanwhile_is_no_loss(
    clip: Clip, spare: Path, tmp_path: Path
) -> None:
    (tmp_path / "gone").write_text("now a file")
    with pytest.raises(OutputError, match=r"the clip is kept as .*spare"):
        clip.save(tmp_path / "gone" / "clip.mp4")
    assert len(list(spare.iterdir())) == 1


def test_without_a_folder_for_temporary_files_the_home_folder_serves(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "gone").write_text("a file")
    with pytest.raises(OutputError, match=r"the clip is kept as .*home"):
        clip.save(tmp_path / "gone" / "clip.mp4")
    assert len(list((tmp_path / "home").iterdir())) == 1


def test_without_an_encoder_the_frames_are_kept(
    clip: Clip, spare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OutputError("cannot encode")

    monkeypatch.setattr(mp4, "encode", fails)
    with pytest.raises(OutputError, match=r"the clip is kept as \S+\.npy"):
        clip.save(tmp_path / "clip.mp4")
    (kept,) = spare.iterdir()
    assert np.array_equal(np.load(kept, allow_pickle=False), clip.frames)


@pytest.mark.parametrize("missing", ["PyAV", "encoder"])
def test_where_nothing_can_be_encoded_no_clip_is_begun_and_none_is_lost(
    missing: str,
    clip: Clip,
    folder: Path,
    spare: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(*_: Any) -> None:
        raise av.codec.codec.UnknownCodecError("libx264")

    if missing == "PyAV":
        monkeypatch.setitem(sys.modules, "av", None)
    else:
        monkeypatch.setattr(av.codec, "Codec", unknown)
    with pytest.raises(OutputError, match=r"no mp4 can be written here .*; the clip is kept as"):
        clip.save(tmp_path / "clip.mp4")
    (kept,) = spare.iterdir()
    assert np.array_equal(np.load(kept, allow_pickle=False), clip.frames)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle")
    for command in (["generate", "p"], ["compare", "p"], ["batch", str(prompts)]):
        words = [*command, "-m", str(folder), "-o", str(tmp_path / "new.mp4")]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2, result.output
        assert "sampling" not in result.output
        assert "no mp4 can be written here" in " ".join(result.stderr.split())
    assert not (tmp_path / "new.mp4").exists()


def test_the_command_says_where_the_clip_is(
    folder: Path, spare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    full(monkeypatch, disk)
    words = ["generate", "a red circle", "-m", str(folder), "--size", "48x48", "--frames", "5"]
    words += ["--steps", "1", "--method", "dense", "-o", str(disk / "clip.mp4")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert "no space left on device); the clip is kept as " in " ".join(result.stderr.split())
    assert len(list(spare.iterdir())) == 1


@pytest.mark.parametrize("fps", [1e300, 1e-300, 0.0, float("nan"), float("inf")])
def test_a_rate_that_cannot_be_written_is_found_before_sampling(
    fps: float, loaded: LoadedPipeline
) -> None:
    with pytest.raises(SettingError, match="fps must be"):
        generate("a red circle", model=loaded, fps=fps, **SMALL)


@pytest.mark.parametrize("name", ["n" * 250 + ".mp4", "n" * 251 + ".mp4"])
def test_a_long_name_is_written_or_refused_before_sampling(
    name: str, clip: Clip, folder: Path, tmp_path: Path
) -> None:
    if len(name) <= 255:
        assert clip.save(tmp_path / name).stat().st_size > 0
        return
    words = ["generate", "p", "-m", str(folder), "-o", str(tmp_path / name)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "sampling" not in result.output
    assert "name" in result.stderr


def test_a_comparison_is_written_as_a_set(
    folder: Path, spare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svg_models.comparison.run import compare

    settings = {name: value for name, value in SMALL.items() if name != "method"}
    comparison = compare(
        "a red circle", model=str(folder), methods=["random@0.5"], device="cpu", **settings
    )
    place = tmp_path / "out"
    place.mkdir()
    (place / "compare.json").write_text("of last time")
    full(monkeypatch, place)
    with pytest.raises(OutputError, match=r"no space left on device.*everything is kept in "):
        comparison.save(place)
    assert [path.name for path in place.iterdir()] == ["compare.json"]
    assert (place / "compare.json").read_text() == "of last time"
    (kept,) = spare.iterdir()
    assert {path.name for path in kept.iterdir()} == {
        "compare.json",
        "dense.mp4",
        "index.html",
        "random-50.mp4",
        "side-by-side.mp4",
    }
    assert json.loads((kept / "compare.json").read_text())["model"] == str(folder)
    assert os.listdir(place) == ["compare.json"]
