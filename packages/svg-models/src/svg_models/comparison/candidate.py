"""One sparse clip beside the dense one."""

from __future__ import annotations

from dataclasses import dataclass

from svg_models.comparison.timing import Speed
from svg_models.generation.clip import Clip
from svg_models.video import Similarity

__all__ = ["Candidate"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One sparse clip beside the dense one.

    Attributes:
        clip: the clip.
        similarity: PSNR and SSIM per frame against the dense clip.
        speed: of its steps beside the same steps dense; None where none can be claimed.
    """

    clip: Clip
    similarity: Similarity
    speed: Speed | None = None
