"""How far one clip is from another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from svg_models.video.frames import Frames, to_frames

if TYPE_CHECKING:
    import torch

__all__ = ["Similarity", "similarity"]

_METRIC_CHUNK = 8  # frames measured at a time, so that 720p clips stay small in memory


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
    SSIM uses a Gaussian window of 11 x 11, sigma 1.5, k1 0.01, k2 0.03, data range 1. It is 1
    where a frame is identical.

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
    for start in range(0, len(ours), _METRIC_CHUNK):
        part = slice(start, start + _METRIC_CHUNK)
        a, b = (
            torch.from_numpy(x[part]).to(device).permute(0, 3, 1, 2).double() / 255.0
            for x in (ours, theirs)
        )
        for one, other in zip(a, b, strict=True):
            psnr.append(float(peak_signal_noise_ratio(one, other, data_range=1.0)))
        values = structural_similarity_index_measure(
            a.to(precision), b.to(precision), data_range=1.0, reduction="none"
        )
        same = (a == b).flatten(1).all(dim=1)
        ssim.extend(torch.where(same, 1.0, torch.atleast_1d(values)).tolist())
    return Similarity(psnr=tuple(psnr), ssim=tuple(ssim))
