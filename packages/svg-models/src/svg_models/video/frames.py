"""One form for any usual form of a clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:  # torch takes seconds to import, and a wrong option shall be refused in one
    import torch

__all__ = ["Frames", "to_frames"]

Frames: TypeAlias = "np.ndarray | torch.Tensor | Sequence[Any]"


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
    if isinstance(frames, np.ndarray) or hasattr(frames, "detach"):
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
    if hasattr(frame, "detach"):  # a tensor
        frame = frame.detach().cpu()
        return (frame.float() if frame.is_floating_point() else frame).numpy()
    if hasattr(frame, "convert"):  # PIL, which need not be installed here
        frame = frame.convert("RGB")
    return np.asarray(frame)
