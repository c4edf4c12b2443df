"""Read and write mp4 files, and measure how far one clip is from another."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from svg_models.errors import SettingError

Frames = np.ndarray | torch.Tensor | Sequence[Any]
_METRIC_CHUNK = 8  # frames measured at a time, so that 720p clips stay small in memory


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its name only when the block succeeds.

    Missing folders are created. If the block is left by any exception, an interrupt included,
    the temporary file is removed and whatever stood under `path` before stays as it was.

    Args:
        path: the final file.

    Yields:
        A path in the same folder with the same suffix, so the final rename is atomic.

    Raises:
        SettingError: if `path` is a folder or its folder cannot be written.
    """
    final = writable_path(path)
    temporary = final.with_name(f".{final.stem}.{secrets.token_hex(4)}.part{final.suffix}")
    try:
        yield temporary
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def writable_path(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a `Path` whose folder exists and can be written.

    Raises:
        SettingError: if it is a folder, or its folder cannot be created or written.
    """
    final = Path(path).expanduser()
    if final.is_dir():
        raise SettingError(f"expected a file to write, got the folder {final}; add a file name")
    writable_folder(final.parent)
    return final


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Refuse a file name that is no mp4.

    Raises:
        SettingError: says what to write instead.
    """
    if Path(path).suffix.lower() != ".mp4":
        raise SettingError(f"clips are written as mp4, got '{path}'; name it {Path(path).stem}.mp4")


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder `path` if it is missing and check that files can be made in it.

    Raises:
        SettingError: if it cannot be created or written.
    """
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".svg-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SettingError(
            f"cannot write in {folder} ({reason}); choose a folder that can be written"
        ) from error
    return folder


def to_frames(frames: Frames) -> np.ndarray:
    """Convert any usual form of a clip to one.

    Args:
        frames: a clip as a numpy array or tensor `[F, H, W, 3]` or `[F, 3, H, W]`, or as a
            sequence of such frames or of PIL images. uint8 counts 0 to 255, floating point
            counts 0 to 1 and is clipped.

    Returns:
        uint8 `[F, H, W, 3]`.

    Raises:
        ValueError: if the shape is none of these or there is no frame.
        TypeError: if the values are neither uint8 nor floating point.
    """
    if isinstance(frames, np.ndarray | torch.Tensor):
        clip = _as_array(frames)
    else:
        if len(frames) == 0:
            raise ValueError("a clip needs at least one frame, got an empty sequence")
        clip = np.stack([_as_array(frame) for frame in frames])
    if clip.ndim == 4 and clip.shape[-1] != 3 and clip.shape[1] == 3:
        clip = clip.transpose(0, 2, 3, 1)
    if clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
        raise ValueError(
            f"a clip is [frames, height, width, 3] or [frames, 3, height, width], got {clip.shape}"
        )
    if clip.dtype == np.uint8:
        return np.ascontiguousarray(clip)
    if not np.issubdtype(clip.dtype, np.floating):
        raise TypeError(f"frames are uint8 in 0..255 or floating point in 0..1, got {clip.dtype}")
    return (np.clip(clip, 0.0, 1.0) * 255.0).round().astype(np.uint8)


def _as_array(frame: Any) -> np.ndarray:
    if isinstance(frame, torch.Tensor):
        frame = frame.detach().cpu()
        return (frame.float() if frame.is_floating_point() else frame).numpy()
    if hasattr(frame, "convert"):  # PIL, which need not be installed here
        frame = frame.convert("RGB")
    return np.asarray(frame)


def write_video(
    frames: Frames,
    path: str | os.PathLike[str],
    *,
    fps: float = 16,
    crf: int = 15,
    keyframe_every: int = 12,
) -> Path:
    """Write a clip as an H.264 mp4 that every browser plays.

    yuv420p in the BT.709 colour space, index at the front of the file. 4:2:0 video has even
    sides, so an odd width or height gains one column or row that repeats the last; nothing is
    resized. The file appears under its name only when complete.

    Args:
        frames: anything `to_frames` takes.
        path: the file to write; missing folders are created.
        fps: frames a second.
        crf: constant rate factor, 0 (lossless) to 51; 15 cannot be told from the source by eye.
        keyframe_every: frames between two key frames; short makes seeking exact and quick.

    Returns:
        The path written.

    Raises:
        SettingError: if the path cannot be written or `fps` is not positive.
        ValueError: if `frames` is not a clip.
    """
    import av

    if not fps > 0:
        raise SettingError(f"fps must be above 0, got {fps}")
    check_suffix(path)
    clip = to_frames(frames)
    height, width = clip.shape[1:3]
    clip = np.pad(clip, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with atomic_path(path) as temporary:
        with av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container:
            rate = Fraction(fps).limit_denominator(1001)
            stream: Any = container.add_stream("libx264", rate=rate)
            stream.width, stream.height = clip.shape[2], clip.shape[1]
            stream.pix_fmt = "yuv420p"
            stream.gop_size = keyframe_every
            stream.options = {"crf": str(crf), "preset": "medium", "tune": "animation"}
            context = stream.codec_context
            context.color_primaries = context.color_trc = context.colorspace = 1  # BT.709
            context.color_range = 1  # studio range, what players assume
            for picture in clip:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame = frame.reformat(
                    format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
                )
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return Path(path).expanduser()


def read_video(path: str | os.PathLike[str]) -> tuple[np.ndarray, float]:
    """Decode a video file.

    Args:
        path: any file that ffmpeg reads.

    Returns:
        uint8 `[F, H, W, 3]` and the frames a second.

    Raises:
        SettingError: if the file cannot be opened or holds no video.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise SettingError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            pictures = [
                f.reformat(format="rgb24", src_colorspace="ITU709").to_ndarray()
                for f in container.decode(stream)
            ]
            fps = float(stream.average_rate or 0)
    except (OSError, av.error.FFmpegError) as error:
        raise SettingError(f"cannot read {path} as a video ({error})") from error
    return np.stack(pictures), fps


@dataclass(frozen=True, kw_only=True, eq=False)
class Similarity:
    """How close a clip is to a reference, frame by frame.

    Attributes:
        psnr: decibels per frame, `inf` where a frame is identical.
        ssim: structural similarity per frame, 1 where a frame is identical.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]

    @property
    def identical_frames(self) -> int:
        """Number of frames that equal the reference bit for bit."""
        return sum(math.isinf(value) for value in self.psnr)

    @property
    def mean_psnr(self) -> float:
        """Mean of the frames' PSNR in dB; frames that are identical are left out.

        `inf` only if every frame is identical. Leaving infinite values out can only lower
        the mean that a reader would expect, never raise it.
        """
        finite = [value for value in self.psnr if math.isfinite(value)]
        return float(np.mean(finite)) if finite else math.inf

    @property
    def worst_psnr(self) -> float:
        """PSNR of the frame that differs most, in dB."""
        return min(self.psnr)

    @property
    def mean_ssim(self) -> float:
        """Mean of the frames' SSIM."""
        return float(np.mean(self.ssim))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which knows no infinity: an identical frame is `None`."""
        return {
            "psnr_mean_db": _finite(self.mean_psnr),
            "psnr_worst_frame_db": _finite(self.worst_psnr),
            "psnr_db": [_finite(value) for value in self.psnr],
            "ssim_mean": self.mean_ssim,
            "ssim": list(self.ssim),
            "identical_frames": self.identical_frames,
        }


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def similarity(
    clip: Frames, reference: Frames, *, device: str | torch.device = "cpu"
) -> Similarity:
    """Measure PSNR and SSIM of each frame of `clip` against `reference` with torchmetrics.

    Both clips are brought to 8 bits a channel, as they are shown, and scaled to 0..1.
    PSNR is `10 log10(1 / mean squared error)` over all pixels and channels of a frame.
    SSIM uses a Gaussian window of 11 x 11, sigma 1.5, k1 0.01, k2 0.03, data range 1, in float64:
    in float32 a frame would differ from itself.

    Args:
        clip: anything `to_frames` takes.
        reference: the same number and size of frames.
        device: where to compute.

    Returns:
        The values per frame.

    Raises:
        ValueError: if the shapes differ or a side is below 11 pixels.

    Source: Wang et al. 2004, Image quality assessment: from error visibility to structural
    similarity, IEEE TIP 13(4).
    """
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    ours, theirs = to_frames(clip), to_frames(reference)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"clips must have one shape to be compared, got {ours.shape} and {theirs.shape}"
        )
    if min(ours.shape[1:3]) < 11:
        raise ValueError(f"SSIM looks through a window of 11 x 11, got frames of {ours.shape[1:3]}")
    psnr: list[float] = []
    ssim: list[float] = []
    for start in range(0, len(ours), _METRIC_CHUNK):
        part = slice(start, start + _METRIC_CHUNK)
        a, b = (
            torch.from_numpy(x[part]).to(device).permute(0, 3, 1, 2).double() / 255.0
            for x in (ours, theirs)
        )
        for one, other in zip(a, b, strict=True):
            psnr.append(float(peak_signal_noise_ratio(one, other, data_range=1.0)))
        values = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
        ssim.extend(torch.atleast_1d(values).tolist())
    return Similarity(psnr=tuple(psnr), ssim=tuple(ssim))


def side_by_side(
    clips: Sequence[Frames], labels: Sequence[str], *, min_width: int = 256, gap: int = 8
) -> np.ndarray:
    """Put clips next to each other, each under its label.

    Small clips are enlarged by a whole factor, so that labels can be read and no pixel is
    invented.

    Args:
        clips: clips of one shape.
        labels: one line each.
        min_width: width in pixels that each clip gets at least.
        gap: pixels between clips.

    Returns:
        uint8 `[F, H', W', 3]`.

    Raises:
        ValueError: if there is no clip, or numbers or shapes differ.
    """
    arrays = [to_frames(clip) for clip in clips]
    if not arrays or len(arrays) != len(labels):
        raise ValueError(
            f"expected one label a clip, got {len(arrays)} clips, {len(labels)} labels"
        )
    if len({a.shape for a in arrays}) != 1:
        raise ValueError(f"clips must have one shape, got {[a.shape for a in arrays]}")
    factor = max(1, math.ceil(min_width / arrays[0].shape[2]))
    arrays = [enlarge(a, factor) for a in arrays]
    height, width = arrays[0].shape[1:3]
    headers = [_label(text, width) for text in labels]
    head = headers[0].shape[0]
    total = len(arrays) * width + (len(arrays) + 1) * gap
    canvas = np.full((len(arrays[0]), height + head + gap, total, 3), 18, np.uint8)
    for index, (array, header) in enumerate(zip(arrays, headers, strict=True)):
        left = gap + index * (width + gap)
        canvas[:, :head, left : left + width] = header
        canvas[:, head : head + height, left : left + width] = array
    return canvas


def enlarge(clip: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel of `[F, H, W, 3]` `factor` times along both sides."""
    return clip.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else clip


def _label(text: str, width: int) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    size = max(13, width // 18)
    font = ImageFont.load_default(size)
    picture = Image.new("RGB", (width, round(size * 2.1)), (18, 18, 18))
    draw = ImageDraw.Draw(picture)
    while draw.textlength(text, font=font) > width and len(text) > 4:
        text = text[:-2].rstrip("… ") + "…"
    draw.text((1, picture.height / 2), text, font=font, fill=(235, 235, 235), anchor="lm")
    return np.asarray(picture)
