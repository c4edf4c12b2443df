"""Read, write, measure and show clips."""

from __future__ import annotations

from svg_models.video.files import atomic_path, check_suffix, writable_folder, writable_path
from svg_models.video.frames import Frames, to_frames
from svg_models.video.metrics import Similarity, similarity
from svg_models.video.montage import enlarge, side_by_side
from svg_models.video.mp4 import read_video, write_video

__all__ = [
    "Frames",
    "Similarity",
    "atomic_path",
    "check_suffix",
    "enlarge",
    "read_video",
    "side_by_side",
    "similarity",
    "to_frames",
    "writable_folder",
    "writable_path",
    "write_video",
]
