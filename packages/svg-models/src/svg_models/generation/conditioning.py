"""The image or the video that a clip starts from."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from svg_models.errors import SettingError, foreign_faults
from svg_models.files import regular_file
from svg_models.video import VideoFile
from svg_models.video.reader import MOST_FRAMES, MOST_PIXELS

if TYPE_CHECKING:
    from svg_models.loading import LoadedPipeline

__all__ = ["NOTHING", "Media", "read_media"]

# What cameras, browsers and this package write; Pillow reads others by calling programs.
_PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True, kw_only=True, eq=False)
class Media:
    """What a clip starts from beside its prompt.

    Attributes:
        image: a PIL image in RGB, or None.
        video: not decoded yet, or None.
        last_image: a PIL image in RGB to end with, or None.
    """

    image: Any = None
    video: VideoFile | None = None
    last_image: Any = None

    def shape(self, loaded: LoadedPipeline, given: dict[str, Any]) -> dict[str, Any]:
        """Choose size, frames and strength where nobody has.

        The size keeps the shape of the image or video at about the number of pixels of the model's
        default, unless the model was trained on one size only. A video that is redrawn or followed
        gives at most the frames it has.

        Args:
            loaded: the model.
            given: settings that somebody chose; `None` means not given.

        Returns:
            More settings, to be merged with those.

        Raises:
            SettingError: if the video is shorter than the frames asked for, or `strength` has no
                meaning here.
        """
        settings: dict[str, Any] = {}
        redraws = self.video is not None and loaded.inputs.video == "redraw"
        strength = given.get("strength")
        if strength is not None and not redraws:
            raise SettingError(
                "strength says how much of a video is redrawn, and nothing is redrawn here; "
                "leave it out, or give --video to a model that redraws"
            )
        if redraws and strength is None:
            settings["strength"] = loaded.default("strength")
        source = self._source_size()
        if source is not None and (given.get("height"), given.get("width")) == (None, None):
            settings |= size_of(loaded, *source)
        if self.video is not None and loaded.inputs.video in ("redraw", "follow"):
            fps = given.get("fps") or loaded.defaults.fps
            have = len(resampled(self.video.frames, self.video.fps, fps))
            settings["frames"] = frames_of(loaded, have, given.get("frames"), fps)
        return settings

    def _source_size(self) -> tuple[int, int] | None:
        if self.image is not None:
            return int(self.image.height), int(self.image.width)
        return None if self.video is None else (self.video.height, self.video.width)

    def arguments(self, loaded: LoadedPipeline, settings: Any) -> dict[str, Any]:
        """Return arguments for the call of the pipeline.

        Args:
            loaded: the model.
            settings: complete, so that sizes are known.
        """
        size = (settings.width, settings.height)
        arguments: dict[str, Any] = {}
        if self.image is not None:
            name = loaded.inputs.image
            image = covering(self.image, size)
            arguments[name] = image if name == "image" else [image]
        if self.last_image is not None:
            arguments["last_image"] = covering(self.last_image, size)
        if self.video is not None:
            index = resampled(self.video.frames, self.video.fps, settings.fps)
            if loaded.inputs.video == "continue":
                index = index[-(loaded.geometry.time + 1) :]  # two latent frames
            else:
                index = index[: settings.frames]
            arguments["video"] = self.video.pictures(
                index.tolist(), lambda picture: covering(_picture(picture), size)
            )
        return arguments


NOTHING = Media()


def read_media(
    image: str | os.PathLike[str] | None = None,
    video: str | os.PathLike[str] | None = None,
    last_image: str | os.PathLike[str] | None = None,
) -> Media:
    """Read the image or the video that a clip starts from.

    Args:
        image: a picture that Pillow reads.
        video: a video that ffmpeg reads.
        last_image: a picture that it ends with.

    Raises:
        SettingError: if one cannot be read.
    """
    return Media(
        image=None if image is None else read_image(image),
        video=None if video is None else VideoFile.open(video),
        last_image=None if last_image is None else read_image(last_image),
    )


def read_image(path: str | os.PathLike[str]) -> Any:
    """Read a picture as a PIL image in RGB, upright as its camera noted.

    Raises:
        SettingError: if it cannot be read, or is larger than is ever decoded.
    """
    import warnings

    from PIL import Image, ImageOps

    file = regular_file(path, "as an image")
    with foreign_faults(f"cannot read {path} as an image", SettingError), ExitStack() as opened:
        opened.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what is wrong is said below, or does not matter
        picture = opened.enter_context(Image.open(file, formats=_PICTURES))
        if picture.width * picture.height > MOST_PIXELS:
            raise SettingError(
                f"{path} is a picture of {picture.width} x {picture.height}, and at most "
                f"{MOST_PIXELS:,} pixels are decoded; make it smaller"
            )
        return ImageOps.exif_transpose(picture).convert("RGB")


def resampled(frames: int, fps: float, to: float) -> np.ndarray:
    """Choose the frames of a video that are shown at a steady rate.

    Args:
        frames: of the video, 1 or more.
        fps: frames a second of the video; 0 if unknown, which takes every frame.
        to: frames a second wanted.

    Returns:
        Index of the frame shown at `i / to` seconds, for each `i` while the video lasts.

    Raises:
        SettingError: if those are too many.
    """
    if not fps or fps == to:
        return np.arange(frames)
    count = math.floor((frames - 1) / fps * to) + 1
    if count > MOST_FRAMES:
        raise SettingError(
            f"the video lasts {frames / fps:.0f} s, which are {count:,} frames at {to:g} a second; "
            "cut it to what is needed"
        )
    return np.floor(np.arange(count) / to * fps + 1e-6).astype(int)


def size_of(loaded: LoadedPipeline, height: int, width: int) -> dict[str, int]:
    """Choose the size of a clip that starts from a picture.

    Args:
        loaded: the model.
        height: of the picture.
        width: of the picture.

    Returns:
        Height and width: what the pipeline makes of it, if only it can choose; the model's default,
        if it knows one size only; else the picture's shape at the default's number of pixels.
    """
    usual = loaded.defaults
    if not loaded.accepts("height"):
        return loaded.size_of_image(height=height, width=width)
    if usual.one_size:
        return {"height": usual.height, "width": usual.width}
    ratio = math.sqrt(usual.height * usual.width / (height * width))
    return loaded.geometry.nearest_size(height=height * ratio, width=width * ratio)


def frames_of(loaded: LoadedPipeline, have: int, asked: int | None, fps: float) -> int:
    """Choose how many frames of a video to use.

    Args:
        loaded: the model.
        have: frames of the video at `fps`.
        asked: frames that somebody chose, or None.
        fps: frames a second of the clip.

    Raises:
        SettingError: if more were asked for than there are.
    """
    most = loaded.geometry.most_frames(min(have, asked or loaded.defaults.frames))
    if asked is not None and asked > have:
        raise SettingError(
            f"the video gives {have} frames at {fps:g} a second, and {asked} were asked for; "
            f"ask for {most}"
        )
    return asked or most


def covering(image: Any, size: tuple[int, int]) -> Any:
    """Scale a PIL image until it covers `size` (width, height), and cut off what stands out."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)


def _picture(frame: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(frame)
