"""What a clip starts from: read, cut to size, cut to time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from zoo import case

from svg_models.errors import SettingError
from svg_models.generation.conditioning import Media, covering, read_media, resampled
from svg_models.generation.generate import generate
from svg_models.loading import Geometry, Inputs, LoadedPipeline, load_pipeline
from svg_models.loading.defaults import defaults_for
from svg_models.video import write_video

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"steps": 4, "guidance": 2.0, "method": "dense"}


@pytest.fixture(scope="module")
def redraws(tmp_path_factory: pytest.TempPathFactory) -> LoadedPipeline:
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.pipeline().save_pretrained(path)
    return load_pipeline(path, device="cpu", video=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    ramp = np.linspace(20, 230, 24).astype(np.uint8)
    frames = np.broadcast_to(ramp[:, None, None, None], (24, 96, 160, 3))
    return str(write_video(frames, tmp_path_factory.mktemp("clips") / "ramp.mp4", fps=32))


@pytest.mark.parametrize(
    ("fps", "to", "expected"),
    [
        (30, 30, list(range(10))),
        (30, 15, [0, 2, 4, 6, 8]),
        (10, 20, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9]),
        (30, 20, [0, 1, 3, 4, 6, 7, 9]),
        (0, 16, list(range(10))),
    ],
)
def test_resampled_takes_the_frames_shown_at_a_steady_rate(
    fps: float, to: float, expected: list[int]
) -> None:
    assert resampled(10, fps, to).tolist() == expected


def test_covering_cuts_a_picture_and_never_squeezes_it() -> None:
    picture = Image.new("RGB", (100, 50), (10, 10, 10))
    picture.paste((250, 0, 0), (0, 0, 25, 50))
    picture.paste((0, 250, 0), (75, 0, 100, 50))
    cut = covering(picture, (32, 32))
    assert cut.size == (32, 32)
    assert np.asarray(cut)[:, 2:-2].max() < 30, "a quarter is cut off at either side"


def test_generate_files_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for path in (tmp_path / "text.png", tmp_path / "missing.png"):
        with pytest.raises(SettingError, match=f"cannot read {path} as an image"):
            read_media(image=path)
    with pytest.raises(SettingError, match="as a video"):
        read_media(video=tmp_path / "text.png")


def test_read_image_turns_a_picture_as_its_camera_noted(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGBA", (40, 20)).convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    image = read_media(image=tmp_path / "turned.jpg").image
    assert (image.size, image.mode) == ((20, 40), "RGB")


def test_shape_settles_size_frames_and_strength_by_a_video(
    redraws: LoadedPipeline, clip: str
) -> None:
    media = read_media(video=clip)
    found = media.shape(redraws, {})
    assert (found["height"], found["width"]) == (496, 816), "five to three at the default's area"
    assert found["frames"] == 9, "12 frames at 16 a second"
    assert found["strength"] == 0.8
    assert media.shape(redraws, {"fps": 32})["frames"] == 21
    assert media.shape(redraws, {"frames": 5, "height": 48, "width": 48}) == {
        "frames": 5,
        "strength": 0.8,
    }
    with pytest.raises(SettingError, match="gives 12 frames at 16 a second, and 49 were asked"):
        media.shape(redraws, {"frames": 49})


def test_shape_refuses_strength_where_nothing_is_redrawn(redraws: LoadedPipeline) -> None:
    with pytest.raises(SettingError, match="nothing is redrawn here"):
        Media().shape(redraws, {"strength": 0.5})


def test_generate_a_redrawn_video_resembles_its_start_the_more_the_less_is_redrawn(
    redraws: LoadedPipeline, clip: str
) -> None:
    clips = {
        strength: generate(
            "a red circle", model=redraws, video=clip, height=48, width=48, frames=9,
            strength=strength, **SHORT,
        )
        for strength in (0.25, 1.0)
    }  # fmt: skip
    assert clips[0.25].frames.shape == (9, 48, 48, 3)
    assert len(clips[0.25].step_seconds) == 1
    assert len(clips[1.0].step_seconds) == 4
    kept = generate(
        "a red circle", model=redraws, video=clip, height=48, width=48, strength=0.25, **SHORT
    )
    assert (kept.frames == clips[0.25].frames).all(), "the video gives 9 frames by itself"
    assert (clips[0.25].frames != clips[1.0].frames).any()


def test_generate_a_strength_that_leaves_no_step_is_refused(
    redraws: LoadedPipeline, clip: str
) -> None:
    with pytest.raises(SettingError, match=r"strength 0\.1 of 4 steps leaves none to run"):
        generate("a", model=redraws, video=clip, strength=0.1, **SHORT)


def test_generate_a_model_that_redraws_asks_for_a_video(redraws: LoadedPipeline) -> None:
    with pytest.raises(SettingError, match="add --video PATH"):
        generate("a red circle", model=redraws, **SHORT)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("wan 2.1 i2v", "image"),
        ("wan 2.2 i2v", "image"),
        ("wan 2.2 ti2v, image", "image"),
        ("wan vace", "image"),
        ("wan vace", "video"),
        ("cogvideox 1.5 i2v", "image"),
        ("cogvideox 1.0 v2v", "video"),
        ("cosmos 1.0 v2w", "image"),
        ("cosmos 1.0 v2w", "video"),
        ("cosmos predict2 v2w", "video"),
        ("ltx i2v", "image"),
    ],
)
def test_generate_what_is_given_reaches_the_model(name: str, kind: str, tmp_path: Path) -> None:
    found = case(name)
    pipe = found.build()
    loaded = LoadedPipeline(
        pipe=pipe,
        name=name,
        inputs=Inputs.of(type(pipe)),
        defaults=defaults_for(name, pipe),
        geometry=Geometry.of(pipe),
        device="cpu",
        dtype=torch.float32,
        loras=(),
        seconds=0.0,
    )
    settings = {key: found.arguments[key] for key in ("height", "width")}
    settings["max_sequence_length"] = found.arguments.get("max_sequence_length")
    call = {"model": loaded, "steps": 2, "guidance": 2.0, "frames": 9, "method": "dense"}
    clips = []
    for shade in (30, 220):
        if kind == "image":
            Image.new("RGB", (48, 32), (shade, 90, 90)).save(tmp_path / "start.png")
        else:
            frames = np.full((24, 32, 48, 3), shade, np.uint8)
            write_video(frames, tmp_path / "start.mp4", fps=loaded.defaults.fps)
        start = {kind: tmp_path / ("start.png" if kind == "image" else "start.mp4")}
        clips.append(generate("a red circle", **start, **call, **settings).frames)
    assert clips[0].shape == (9, settings["height"], settings["width"], 3)
    assert (clips[0] != clips[1]).any()
