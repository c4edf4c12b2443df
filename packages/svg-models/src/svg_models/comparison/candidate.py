"""One sparse clip beside the dense one."""

from __future__ import annotations

from dataclasses import dataclass

from svg_models.generation.clip import Clip
from svg_models.video import Similarity

__all__ = ["Candidate"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One sparse clip beside the dense one.

    Attributes:
        clip: the clip.
        similarity: PSNR and SSIM per frame against the dense clip.
        speedup: dense seconds over this clip's seconds, denoising loop only.
    """

    clip: Clip
    similarity: Similarity
    speedup: float
