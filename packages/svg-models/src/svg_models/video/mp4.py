"""Write clips as mp4."""

from __future__ import annotations

import math
import os
import secrets
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from svg_models.errors import OutputError, SettingError, SvgModelsError, first_line
from svg_models.files import atomic_path, check_suffix, spare_folders, user_path
from svg_models.video.frames import Frames, to_frames

__all__ = [
    "FPS",
    "LARGEST_SIDE",
    "check_encoder",
    "check_fps",
    "encode",
    "keep_elsewhere",
    "write_video",
]

FPS = (0.01, 1000.0)
"""The slowest and the fastest clip that is written, in frames a second."""
LARGEST_SIDE = 16_384
"""Pixels that H.264 takes along a side."""


def check_encoder() -> None:
    """Refuse where no clip can be written; better before one is made than after.

    Raises:
        SettingError: if there is no PyAV that works, or none with an encoder for H.264.
    """
    try:
        import av

        av.codec.Codec("libx264", "w")
    except (ImportError, ValueError) as error:
        raise SettingError(
            f"no mp4 can be written here ({first_line(error)}); pip install --force-reinstall av"
        ) from error


def check_fps(fps: float) -> None:
    """Refuse a rate at which no clip can be written.

    Raises:
        SettingError: if it is not in the range `FPS`.
    """
    if not fps > 0:
        raise SettingError(f"fps must be above 0, got {fps}")
    if not FPS[0] <= fps <= FPS[1]:
        raise SettingError(f"fps must be {FPS[0]:g} to {FPS[1]:g}, got {fps:g}")


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
        SettingError: if the path is no place for a file, `fps` is out of range or there is no
            encoder.
        OutputError: if the file cannot be written, for example because the disk is full.
        ValueError: if `frames` is not a clip.
    """
    check_fps(fps)
    check_suffix(path)
    clip = to_frames(frames)
    with atomic_path(path) as temporary:
        encode(clip, temporary, fps=fps, crf=crf, keyframe_every=keyframe_every)
    return user_path(path)


def encode(
    frames: Frames, target: Path | BinaryIO, *, fps: float, crf: int = 15, keyframe_every: int = 12
) -> None:
    """Encode a clip; see `write_video`.

    Args:
        frames: anything `to_frames` takes.
        target: an absolute path, which ffmpeg cannot take for an address, or a buffer in memory;
            only a file has its index at the front.
        fps: frames a second.
        crf: constant rate factor.
        keyframe_every: frames between two key frames.

    Raises:
        SettingError: if there is no encoder.
        OutputError: if it cannot take the clip or the file cannot be written.
    """
    check_encoder()
    import av

    clip = to_frames(frames)
    height, width = clip.shape[1:3]
    clip = np.pad(clip, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    is_file = isinstance(target, Path)
    options = {"movflags": "+faststart"} if is_file else {}  # ffmpeg reads it again by its name
    try:
        with av.open(
            str(target) if is_file else target, "w", format="mp4", options=options
        ) as container:
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
    except av.error.FFmpegError as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise OutputError(f"cannot write {target} ({str(reason).lower()})") from error


def keep_elsewhere(frames: Frames, name: str, *, fps: float) -> str:
    """Write a clip where there is room, because it cannot be written where it should be.

    Args:
        frames: anything `to_frames` takes.
        name: a word for the file's name.
        fps: frames a second.

    Returns:
        The second half of a sentence that says where it is.
    """
    for write in (_keep_video, _keep_array):
        for folder in spare_folders():
            try:
                return f"the clip is kept as {write(to_frames(frames), folder, name, fps)}"
            except (SvgModelsError, OSError):
                continue
    return "and there was no room for it anywhere else"


def _keep_video(clip: np.ndarray, folder: Path, name: str, fps: float) -> Path:
    rate = min(max(fps, FPS[0]), FPS[1]) if math.isfinite(fps) else FPS[0]
    return write_video(clip, _unused(folder, name, ".mp4"), fps=rate)


def _keep_array(clip: np.ndarray, folder: Path, name: str, _: float) -> Path:
    path = _unused(folder, name, ".npy")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, clip)
    return path


def _unused(folder: Path, name: str, suffix: str) -> Path:
    return folder / f"svg-{name[:40]}-{secrets.token_hex(4)}{suffix}"
