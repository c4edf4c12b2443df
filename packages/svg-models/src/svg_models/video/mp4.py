"""Read and write video files."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from svg_models.errors import SettingError
from svg_models.video.files import atomic_path, check_suffix
from svg_models.video.frames import Frames, to_frames

__all__ = ["read_video", "write_video"]


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
