"""Read, write, measure and show clips."""

from __future__ import annotations

from svg_models.video.frames import Frames, to_frames
from svg_models.video.metrics import METRICS, Similarity, Spread, similarity
from svg_models.video.montage import contact_sheet, enlarge, side_by_side
from svg_models.video.mp4 import (
    FPS,
    LARGEST_SIDE,
    check_encoder,
    encode,
    keep_elsewhere,
    write_video,
)
from svg_models.video.reader import VideoFile, read_video

__all__ = [
    "FPS",
    "LARGEST_SIDE",
    "METRICS",
    "Frames",
    "Similarity",
    "Spread",
    "VideoFile",
    "check_encoder",
    "contact_sheet",
    "encode",
    "enlarge",
    "keep_elsewhere",
    "read_video",
    "side_by_side",
    "similarity",
    "to_frames",
    "write_video",
]
