"""Several clips in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from svg_models.video.frames import Frames, to_frames

__all__ = ["contact_sheet", "enlarge", "side_by_side"]


def side_by_side(
    clips: Sequence[Frames], labels: Sequence[str], *, min_width: int = 256, gap: int = 8
) -> np.ndarray:
    """Put clips next to each other, each under its label.

    Small clips are enlarged by a whole factor, so that labels can be read and no pixel is
    invented.

    Args:
        clips: clips of one shape.
        labels: one line each.
        min_width: width in pixels that each clip gets at least.
        gap: pixels between clips.

    Returns:
        uint8 `[F, H', W', 3]`.

    Raises:
        ValueError: if there is no clip, or numbers or shapes differ.
    """
    arrays = [to_frames(clip) for clip in clips]
    if not arrays or len(arrays) != len(labels):
        raise ValueError(
            f"expected one label a clip, got {len(arrays)} clips, {len(labels)} labels"
        )
    if len({a.shape for a in arrays}) != 1:
        raise ValueError(f"clips must have one shape, got {[a.shape for a in arrays]}")
    factor = max(1, math.ceil(min_width / arrays[0].shape[2]))
    arrays = [enlarge(a, factor) for a in arrays]
    height, width = arrays[0].shape[1:3]
    headers = [_label(text, width) for text in labels]
    head = headers[0].shape[0]
    total = len(arrays) * width + (len(arrays) + 1) * gap
    canvas = np.full((len(arrays[0]), height + head + gap, total, 3), 18, np.uint8)
    for index, (array, header) in enumerate(zip(arrays, headers, strict=True)):
        left = gap + index * (width + gap)
        canvas[:, :head, left : left + width] = header
        canvas[:, head : head + height, left : left + width] = array
    return canvas


def contact_sheet(
    pictures: Sequence[np.ndarray], labels: Sequence[str], *, columns: int = 4, width: int = 320
) -> np.ndarray:
    """Lay out one picture of each clip with its label above.

    Args:
        pictures: uint8 `[H, W, 3]`, of any sizes.
        labels: one line each.
        columns: pictures in a row, at most.
        width: pixels that each is scaled to.

    Returns:
        uint8 `[H', W', 3]`.

    Raises:
        ValueError: if there is no picture, or the numbers differ.
    """
    from PIL import Image

    if not pictures or len(pictures) != len(labels):
        raise ValueError(
            f"expected one label a picture, got {len(pictures)} pictures, {len(labels)} labels"
        )
    columns, gap = min(columns, len(pictures)), 8
    cells = []
    for picture, text in zip(pictures, labels, strict=True):
        height = max(1, round(picture.shape[0] * width / picture.shape[1]))
        scaled = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
        cells.append(np.concatenate([_label(text, width), np.asarray(scaled)]))
    rows = [cells[at : at + columns] for at in range(0, len(cells), columns)]
    heights = [max(len(cell) for cell in row) for row in rows]
    sheet = np.full(
        (sum(heights) + gap * (len(rows) + 1), columns * (width + gap) + gap, 3), 18, np.uint8
    )
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for index, cell in enumerate(row):
            left = gap + index * (width + gap)
            sheet[top : top + len(cell), left : left + width] = cell
        top += height + gap
    return sheet


def enlarge(clip: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel of `[F, H, W, 3]` `factor` times along both sides."""
    return clip.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else clip


def _label(text: str, width: int) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    size = max(13, width // 18)
    font = ImageFont.load_default(size)
    picture = Image.new("RGB", (width, round(size * 2.1)), (18, 18, 18))
    draw = ImageDraw.Draw(picture)
    while draw.textlength(text, font=font) > width and len(text) > 4:
        text = text[:-2].rstrip("… ") + "…"
    draw.text((1, picture.height / 2), text, font=font, fill=(235, 235, 235), anchor="lm")
    return np.asarray(picture)
