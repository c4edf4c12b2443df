"""Read video files that strangers made: never more than is needed, never from anywhere else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from svg_models.errors import SettingError, foreign_faults
from svg_models.files import regular_file
from svg_models.video.mp4 import FPS

__all__ = ["MOST_FRAMES", "MOST_PIXELS", "VideoFile", "read_video"]

MOST_PIXELS = 1 << 26  # of one picture: 8192 x 8192, 200 MB in RGB
MOST_FRAMES = 1 << 17  # of one file: more than an hour at 30 a second
_MOST_BYTES = 1 << 32  # of a whole video in memory

# Containers that hold their own pictures; ffmpeg also reads play lists, which name other files and
# addresses, and takes any text for a video of a terminal.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,gif,flv,ogg,asf,apng,ivf,h264"

Kept = TypeVar("Kept")


@dataclass(frozen=True, kw_only=True)
class VideoFile:
    """A video on this machine, of which only the first frame has been decoded.

    Attributes:
        path: a regular file.
        frames: how many it holds.
        height: pixels.
        width: pixels.
        fps: frames a second; 0 if unknown.
    """

    path: Path
    frames: int
    height: int
    width: int
    fps: float

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> VideoFile:
        """Look into a video file.

        Raises:
            SettingError: if it is no file, holds no video, or is larger than is ever decoded.
        """
        file = regular_file(path, "as a video")
        with _container(file) as container:
            stream = _stream(file, container)
            _check_size(file, stream.width, stream.height)
            frames = _count(file, container, stream)
            rate = float(stream.average_rate or 0)
        with _container(file) as container:
            first = next(iter(container.decode(_stream(file, container))), None)
            if first is None:
                raise SettingError(f"cannot read {file} as a video (no frame can be decoded)")
            _check_size(file, first.width, first.height)
        return cls(
            path=file,
            frames=frames,
            height=first.height,
            width=first.width,
            fps=rate if FPS[0] <= rate <= FPS[1] else 0.0,
        )

    def pictures(self, wanted: Iterable[int], keep: Callable[[np.ndarray], Kept]) -> list[Kept]:
        """Decode some frames, one at a time.

        Args:
            wanted: indices of frames, in any order, some perhaps more than once.
            keep: given uint8 `[H, W, 3]`, returns what is kept of a frame.

        Returns:
            What was kept, in the order of `wanted`.

        Raises:
            SettingError: if the file is broken before the last of them.
        """
        order = list(wanted)
        missing = set(order)
        kept: dict[int, Kept] = {}
        with _container(self.path) as container:
            for index, frame in enumerate(container.decode(_stream(self.path, container))):
                if index in missing:
                    missing.remove(index)
                    picture = frame.reformat(
                        width=self.width,
                        height=self.height,
                        format="rgb24",
                        src_colorspace="ITU709",
                    )
                    kept[index] = keep(picture.to_ndarray())
                if not missing:
                    break
        if missing:
            raise SettingError(
                f"{self.path} is broken: it ends before frame {min(missing) + 1} of {self.frames}"
            )
        return [kept[index] for index in order]


def read_video(path: str | os.PathLike[str]) -> tuple[np.ndarray, float]:
    """Decode a whole video file.

    Args:
        path: a file in one of the usual containers.

    Returns:
        uint8 `[F, H, W, 3]` and the frames a second, 0 if unknown.

    Raises:
        SettingError: if the file cannot be opened, holds no video, or is too large for memory.
    """
    video = VideoFile.open(path)
    size = video.frames * video.height * video.width * 3
    if size > _MOST_BYTES:
        raise SettingError(
            f"{path} has {video.frames} frames of {video.width} x {video.height}, which take "
            f"{size / (1 << 30):.0f} GiB; cut it to at most {_MOST_BYTES / (1 << 30):.0f} GiB"
        )
    return np.stack(video.pictures(range(video.frames), np.asarray)), video.fps


@contextmanager
def _container(file: Path) -> Iterator[Any]:
    """Open a file for ffmpeg, which may neither open another one nor allocate a huge picture."""
    import av

    # Text that is no text is no reason to refuse a video; from PyAV 19 on it never is.
    known: dict[str, Any] = {}
    if int(av.__version__.partition(".")[0]) < 19:
        known["metadata_errors"] = "replace"
    # An open file instead of a name: what looks like an address cannot be one.
    with foreign_faults(f"cannot read {file} as a video", SettingError), file.open("rb") as handle:
        with av.open(
            handle,
            options={"max_pixels": str(MOST_PIXELS)},  # of the container and all its streams
            container_options={"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"},
            **known,
        ) as container:
            yield container


def _stream(file: Path, container: Any) -> Any:
    if not container.streams.video:
        raise SettingError(f"{file} holds no video stream")
    stream = container.streams.video[0]
    stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
    return stream


def _check_size(file: Path, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise SettingError(
            f"{file} has pictures of {width} x {height}, and at most {MOST_PIXELS:,} pixels are "
            "decoded; make it smaller"
        )


def _count(file: Path, container: Any, stream: Any) -> int:
    """Count frames by their packets: headers may say anything, and decoding takes long."""
    count = 0
    for packet in container.demux(stream):
        count += packet.size > 0
        if count > MOST_FRAMES:
            raise SettingError(
                f"{file} has more than {MOST_FRAMES:,} frames; cut it to what is needed"
            )
    return count
