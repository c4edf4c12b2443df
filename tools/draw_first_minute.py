"""Draw `docs/assets/first-minute.webp`: clips of the embedded model, dense beside SVG2, moving.

    python tools/draw_first_minute.py

Prompts, seeds and settings stand below, so the picture is the same whenever it is drawn on the same
kind of processor. Two cores take some minutes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from svg_models import generate
from svg_models.video import side_by_side, similarity

TARGET = Path(__file__).resolve().parents[1] / "docs" / "assets" / "first-minute.webp"
PROMPTS = (
    "a large red star moving right on a plain navy background",
    "a pink ring moving left and a cyan star moving right on a plain black background",
)
METHOD = "svg2-error@0.3"
MOST_BYTES = 3 << 20
FPS = 12


def pictures() -> np.ndarray:
    """Return the clips of all prompts below each other: uint8 `[F, H, W, 3]`."""
    rows = []
    for prompt in PROMPTS:
        dense, clip = (
            generate(prompt=prompt, method=method, seed=0, steps=20, frames=49)
            for method in ("dense", METHOD)
        )
        close = similarity(clip.frames, dense.frames)
        labels = [
            "dense: every query-key pair",
            f"SVG2: {clip.stats.mean_density:.0%} of them, {close.mean_psnr:.0f} dB",
        ]
        rows.append(side_by_side([dense.frames, clip.frames], labels))
    return np.concatenate(rows, axis=1)


def write_webp(frames: np.ndarray, path: Path, *, fps: float = FPS) -> None:
    """Write frames as an animated WebP that repeats for ever.

    Raises:
        ValueError: if it is larger than what a page may carry.
    """
    first, *others = (Image.fromarray(frame) for frame in frames)
    first.save(
        path,
        "WEBP",
        save_all=True,
        append_images=others,
        duration=round(1000 / fps),
        loop=0,
        quality=80,
        method=6,
    )
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than {MOST_BYTES:,}")


if __name__ == "__main__":
    write_webp(pictures(), TARGET)
    print(TARGET, f"{TARGET.stat().st_size:,} bytes")
