"""How far one clip is from another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from svg_models.video.frames import Frames, to_frames

if TYPE_CHECKING:
    import torch

__all__ = ["METRICS", "Similarity", "Spread", "similarity"]

_METRIC_CHUNK = 8  # frames measured at a time, so that 720p clips stay small in memory

METRICS: dict[str, str] = {
    "psnr": "torchmetrics, 8-bit frames scaled to 0..1, data_range 1, per frame; the mean leaves "
    "identical frames out",
    "ssim": "torchmetrics, Gaussian window 11 x 11, sigma 1.5, data_range 1, per frame",
    "flip": "FLIP (Andersson et al. 2020), low dynamic range, 67 pixels per degree, mean of each "
    "frame; 0 is identical",
    "flicker": "mean absolute difference of the two clips' changes from frame to frame, in levels "
    "of 255; 0 is identical",
}
"""How each number is computed, for those who read it."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and spread of one number over clips.

    Attributes:
        mean: of the finite values; None if there is none.
        deviation: their standard deviation, 0 for a single one; None if there is none.
        least: smallest finite value.
        most: largest finite value.
        count: of the finite values.
    """

    mean: float | None
    deviation: float | None
    least: float | None
    most: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarise values; infinite ones, of clips that are identical, are left out."""
        finite = [float(value) for value in values if math.isfinite(value)]
        if not finite:
            return cls(mean=None, deviation=None, least=None, most=None, count=0)
        return cls(
            mean=float(np.mean(finite)),
            deviation=float(np.std(finite, ddof=min(1, len(finite) - 1))),
            least=min(finite),
            most=max(finite),
            count=len(finite),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Similarity:
    """How close a clip is to a reference, frame by frame.

    Attributes:
        psnr: decibels per frame, `inf` where a frame is identical.
        ssim: structural similarity per frame, 1 where a frame is identical.
        flip: difference that a person sees, per frame, 0 where a frame is identical, at most 1.
        flicker: difference of the changes from each frame to the next, one fewer than frames, in
            levels of 255; 0 where both clips change alike.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    flip: tuple[float, ...]
    flicker: tuple[float, ...]

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

    @property
    def mean_flip(self) -> float:
        """Mean of the frames' FLIP."""
        return float(np.mean(self.flip))

    @property
    def mean_flicker(self) -> float:
        """Mean difference of the changes from frame to frame, in levels of 255; 0 for one frame."""
        return float(np.mean(self.flicker)) if self.flicker else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which knows no infinity: an identical frame is `None`."""
        return {
            "psnr_mean_db": _finite(self.mean_psnr),
            "psnr_worst_frame_db": _finite(self.worst_psnr),
            "psnr_db": [_finite(value) for value in self.psnr],
            "ssim_mean": self.mean_ssim,
            "ssim": list(self.ssim),
            "flip_mean": round(self.mean_flip, 6),
            "flip": [round(value, 6) for value in self.flip],
            "flicker_mean": round(self.mean_flicker, 4),
            "flicker": [round(value, 4) for value in self.flicker],
            "identical_frames": self.identical_frames,
        }


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def similarity(
    clip: Frames, reference: Frames, *, device: str | torch.device = "cpu"
) -> Similarity:
    """Measure how each frame of `clip`, and each change of frame, differs from `reference`.

    Both clips are brought to 8 bits a channel, as they are shown, and scaled to 0..1.
    PSNR is `10 log10(1 / mean squared error)` over all pixels and channels of a frame.
    SSIM uses a Gaussian window of 11 x 11, sigma 1.5, k1 0.01, k2 0.03, data range 1. It is 1
    where a frame is identical. Both are torchmetrics'. FLIP is `svg_models.video.flip.flip`'s.
    Flicker is the mean of `|(a[t+1] - a[t]) - (b[t+1] - b[t])|` over the pixels and channels of
    two successive frames of both clips.

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
    import torch
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    from svg_models.video.flip import flip

    ours, theirs = to_frames(clip), to_frames(reference)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"clips must have one shape to be compared, got {ours.shape} and {theirs.shape}"
        )
    if min(ours.shape[1:3]) < 11:
        raise ValueError(f"SSIM looks through a window of 11 x 11, got frames of {ours.shape[1:3]}")
    # A CPU has no fast convolution in float64 and is right to 1e-5 in float32; a GPU would round
    # the factors of a float32 convolution to ten bits.
    precision = torch.float64 if torch.device(device).type == "cuda" else torch.float32
    psnr: list[float] = []
    ssim: list[float] = []
    seen: list[float] = []
    for start in range(0, len(ours), _METRIC_CHUNK):
        part = slice(start, start + _METRIC_CHUNK)
        a, b = (
            torch.from_numpy(x[part]).to(device).permute(0, 3, 1, 2).double() / 255.0
            for x in (ours, theirs)
        )
        for one, other in zip(a, b, strict=True):
            psnr.append(float(peak_signal_noise_ratio(one, other, data_range=1.0)))
        one, other = a.to(precision), b.to(precision)
        values = structural_similarity_index_measure(one, other, data_range=1.0, reduction="none")
        same = (a == b).flatten(1).all(dim=1)
        ssim.extend(torch.where(same, 1.0, torch.atleast_1d(values)).tolist())
        seen.extend(flip(one, other).tolist())
    return Similarity(
        psnr=tuple(psnr), ssim=tuple(ssim), flip=tuple(seen), flicker=_flicker(ours, theirs)
    )


def _flicker(clip: np.ndarray, reference: np.ndarray) -> tuple[float, ...]:
    """Return the mean difference of each change of frame, two frames in memory at a time."""
    apart = (x.astype(np.int16) - y for x, y in zip(clip, reference, strict=True))
    return tuple(float(np.abs(b - a).mean()) for a, b in itertools.pairwise(apart))
