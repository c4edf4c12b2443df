"""Writing, reading and comparing clips."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from svg_models.errors import SettingError
from svg_models.files import atomic_path
from svg_models.video import (
    Spread,
    read_video,
    side_by_side,
    similarity,
    to_frames,
    write_video,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def gradient(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """Make a clip that moves, in colours that survive 4:2:0."""
    y, x = np.mgrid[:height, :width]
    clip = [np.stack([(x * 4 + 8 * t) % 200, y * 5, 0 * x + 90], -1) for t in range(frames)]
    return np.asarray(clip).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "form", ["uint8", "float", "channels first", "torch", "bf16", "list", "pil"]
)
def test_to_frames_takes_every_form_of_a_clip(form: str) -> None:
    clip = gradient()
    scaled = clip.astype(np.float32) / 255
    channels_first = torch.from_numpy(scaled).permute(0, 3, 1, 2)
    forms = {
        "uint8": clip,
        "float": scaled,
        "channels first": channels_first.numpy(),
        "torch": channels_first,
        "bf16": torch.from_numpy(clip).to(torch.bfloat16) / 255,
        "list": list(scaled),
        "pil": [Image.fromarray(frame) for frame in clip],
    }
    tolerance = 1 if form == "bf16" else 0
    assert np.abs(to_frames(forms[form]).astype(int) - clip).max() <= tolerance


def test_to_frames_clips_floating_point_beyond_the_range() -> None:
    clip = np.array([[[[-1.0, 0.5, 2.0]]]])
    assert to_frames(clip).tolist() == [[[[0, 128, 255]]]]


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 8, 4), (0, 8, 8, 3), (2, 3, 0, 8)])
def test_to_frames_refuses_what_is_no_clip(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a clip is"):
        to_frames(np.zeros(shape, np.float32))


def test_to_frames_refuses_integers_other_than_bytes() -> None:
    with pytest.raises(TypeError, match="uint8"):
        to_frames(np.zeros((1, 4, 4, 3), np.int64))
    with pytest.raises(ValueError, match="at least one frame"):
        to_frames([])


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 48), (32, 47), (31, 31), (16, 130)])
@pytest.mark.parametrize("fps", [8, 12.5, 23.976])
def test_write_video_a_written_clip_reads_back(
    height: int, width: int, fps: float, tmp_path: Path
) -> None:
    clip = gradient(7, height, width)
    path = write_video(clip, tmp_path / "deep" / "er" / "clip.mp4", fps=fps)
    frames, rate = read_video(path)
    assert frames.shape == (7, height + height % 2, width + width % 2, 3)
    assert rate == pytest.approx(fps, rel=1e-3)
    kept = frames[:, :height, :width]
    assert similarity(kept, clip).mean_psnr > 30
    if width % 2:
        assert np.abs(frames[:, :, width].astype(int) - frames[:, :, width - 1]).max() < 16


def test_write_video_the_file_is_what_browsers_play(tmp_path: Path) -> None:
    import av

    path = write_video(gradient(30), tmp_path / "clip.mp4", keyframe_every=10)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert sum(frame.key_frame for frame in container.decode(stream)) >= 3


def test_write_video_colours_survive(tmp_path: Path) -> None:
    colours = [(230, 40, 40), (40, 230, 40), (40, 40, 230), (128, 128, 128), (250, 250, 250)]
    for number, colour in enumerate(colours):
        clip = np.full((3, 32, 32, 3), colour, np.uint8)
        frames, _ = read_video(write_video(clip, tmp_path / f"{number}.mp4"))
        assert np.abs(frames[1, 16, 16].astype(int) - colour).max() <= 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_write_video_an_interrupted_write_leaves_the_old_file(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import av

    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the old clip")
    build, seen = av.VideoFrame.from_ndarray, []

    class Frame:
        @staticmethod
        def from_ndarray(*arguments: object, **options: object) -> object:
            seen.append(sorted(p.name for p in tmp_path.iterdir()))
            if len(seen) == 150:
                raise error
            return build(*arguments, **options)

    monkeypatch.setattr(av, "VideoFrame", Frame)
    with pytest.raises(error):
        write_video(gradient(200), path)
    assert len(seen[-1]) == 2, "a temporary file stood beside the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    assert path.read_bytes() == b"the old clip"


def test_read_video_refuses_bad_files(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="mp4"):
        write_video(gradient(), tmp_path / "clip.avi")
    with pytest.raises(SettingError, match="fps must be above 0"):
        write_video(gradient(), tmp_path / "clip.mp4", fps=0)
    with pytest.raises(SettingError, match="folder"):
        with atomic_path(tmp_path):
            pass
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(SettingError, match="cannot read"):
        read_video(tmp_path / "text.mp4")
    with pytest.raises(SettingError, match="cannot read"):
        read_video(tmp_path / "missing.mp4")


def test_similarity_psnr_is_the_closed_form_and_counts_identical_frames() -> None:
    clip = gradient(4, 32, 32)
    other = clip.copy()
    other[1] = np.where(clip[1] < 128, clip[1] + 10, clip[1] - 10)
    other[2, 0, 0, 0] += 5
    result = similarity(other, clip)
    expected = [math.inf, 10 * math.log10(255**2 / 100), 0.0, math.inf]
    expected[2] = 10 * math.log10(255**2 * 32 * 32 * 3 / 25)
    assert result.psnr == pytest.approx(expected, rel=1e-4)
    assert result.identical_frames == 2
    assert result.mean_psnr == pytest.approx((expected[1] + expected[2]) / 2, rel=1e-4)
    assert result.worst_psnr == pytest.approx(expected[1], rel=1e-4)
    plain = result.to_dict()
    assert plain["psnr_db"][0] is None
    assert plain["psnr_mean_db"] == pytest.approx(result.mean_psnr, abs=1e-3)


def test_similarity_of_identical_clips_has_no_finite_psnr() -> None:
    result = similarity(gradient(3), gradient(3))
    assert math.isinf(result.mean_psnr)
    assert result.ssim == (1.0,) * 3, "and not something near it"
    assert result.to_dict()["psnr_mean_db"] is None
    assert (result.flip, result.flicker) == ((0.0,) * 3, (0.0,) * 2)


def test_similarity_flicker_is_the_difference_of_the_changes() -> None:
    still = np.full((4, 16, 16, 3), 100, np.uint8)
    blinks = still.copy()
    blinks[1::2] += 6
    result = similarity(blinks, still)
    assert result.flicker == (6.0, 6.0, 6.0)
    assert result.mean_flicker == 6.0
    # A constant difference does not flicker, and neither does a change that both clips share.
    assert similarity(still + 6, still).flicker == (0.0, 0.0, 0.0)
    moving = gradient(4, 16, 16)
    assert similarity(np.minimum(moving, 200), np.minimum(moving, 200)).mean_flicker == 0.0
    assert similarity(still[:1], blinks[:1]).mean_flicker == 0.0
    half = still.copy()
    half[2, :8] = 0  # a change of 100 in half of a frame, and back
    assert similarity(half, still).flicker == (0.0, 50.0, 50.0)


def test_spread_is_over_the_finite_values() -> None:
    spread = Spread.of([30.0, 32.0, math.inf, 37.0])
    assert (spread.mean, spread.least, spread.most, spread.count) == (33.0, 30.0, 37.0, 3)
    assert spread.deviation == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert Spread.of([31.5]).deviation == 0.0
    assert Spread.of([math.inf]).mean is None


def gaussian_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Follow Wang et al. 2004 pixel by pixel for one channel, away from the border."""
    axis = np.arange(-5, 6)
    window = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(5, x.shape[0] - 5):
        for j in range(5, x.shape[1] - 5):
            a, b = (z[i - 5 : i + 6, j - 5 : j + 6] for z in (x, y))
            ma, mb = (window * a).sum(), (window * b).sum()
            va = (window * (a - ma) ** 2).sum()
            vb = (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            top = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
            values.append(top / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return float(np.mean(values))


def test_similarity_ssim_follows_the_paper() -> None:
    random = np.random.default_rng(0)
    clip = gradient(1, 24, 24)
    noisy = (clip.astype(int) + random.integers(-40, 40, clip.shape)).clip(0, 255).astype(np.uint8)
    ours = similarity(noisy, clip).mean_ssim
    channels = [gaussian_ssim(noisy[0, ..., c] / 255, clip[0, ..., c] / 255) for c in range(3)]
    assert ours == pytest.approx(np.mean(channels), abs=0.01)
    assert 0.05 < ours < 0.95


def test_similarity_refuses_clips_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="one shape"):
        similarity(gradient(3), gradient(4))
    with pytest.raises(ValueError, match="11 x 11"):
        similarity(gradient(1, 8, 40), gradient(1, 8, 40))


def test_write_video_side_by_side_keeps_pixels_and_labels_them() -> None:
    one, other = gradient(2, 32, 32), 255 - gradient(2, 32, 32)
    canvas = side_by_side(
        [one, other], ["Dense", "a label far too long to fit " * 4], min_width=100
    )
    factor = 4  # the least whole factor that reaches 100 pixels
    assert canvas.shape[0] == 2
    assert canvas.shape[2] == 2 * 32 * factor + 3 * 8
    bottom = canvas[:, -8 - 32 * factor : -8]
    assert (bottom[:, ::factor, 8 : 8 + 32 * factor : factor] == one).all()
    assert (bottom[:, ::factor, 16 + 32 * factor : -8 : factor] == other).all()
    head = canvas[0, : canvas.shape[1] - 8 - 32 * factor]
    assert (head > 200).any(), "the label is drawn"
    with pytest.raises(ValueError, match="one label a clip"):
        side_by_side([one], [])
