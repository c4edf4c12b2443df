"""Say what a clip shows, from its pixels alone: colours, numbers, directions, shapes.

Works because the world is simple: shapes are saturated, backgrounds are not. Colours are told apart
by hue, shapes by overlap with drawn templates, directions by where a colour's centre goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from .clips import COLOURS, SHAPES, Group
from .render import shape_distance

MIN_CHROMA = 0.22
MIN_SPOT = 0.15  # a part smaller than this fraction of the largest does not count
STILL = 0.10  # a centre that moves less than this fraction of the frame stands still


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which parts of a description the pixels confirm."""

    colour: bool
    direction: bool
    count: bool
    shape: bool

    @property
    def all(self) -> bool:
        """Whether everything agrees."""
        return self.colour and self.direction and self.count and self.shape


def _hue(rgb: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    red, green, blue = (rgb[..., i] for i in range(3))
    hue = np.degrees(np.arctan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    return hue, rgb.max(-1) - rgb.min(-1)


def colour_map(frames: NDArray[np.float32]) -> NDArray[np.int64]:
    """Name the palette colour of every pixel of `[..., 3]` in [0, 1]; -1 where none is there."""
    hue, chroma = _hue(frames)
    palette = np.array([_hue(np.array(rgb, np.float32))[0] for rgb in COLOURS.values()])
    gap = np.abs((hue[..., None] - palette + 180) % 360 - 180)
    nearest = gap.argmin(-1)
    return np.where(chroma > MIN_CHROMA, nearest, -1)


def parts(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Split a mask `[H, W]` into its 4-connected parts, largest first, specks left out."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # spread the largest label until nothing changes
        grown = label.copy()
        grown[1:] = np.maximum(grown[1:], label[:-1])
        grown[:-1] = np.maximum(grown[:-1], label[1:])
        grown[:, 1:] = np.maximum(grown[:, 1:], label[:, :-1])
        grown[:, :-1] = np.maximum(grown[:, :-1], label[:, 1:])
        grown = np.where(mask, grown, 0)
        if (grown == label).all():
            break
        label = grown
    names, areas = np.unique(label[label > 0], return_counts=True)
    if not len(names):
        return []
    ranked = sorted(zip(areas, names, strict=True), reverse=True)
    return [label == name for area, name in ranked if area >= MIN_SPOT * ranked[0][0]]


@lru_cache(maxsize=1)
def _templates(side: int = 32, turns: int = 24) -> NDArray[np.bool_]:
    """Masks of every shape at every angle, scaled to equal second moments: `[S, A, side^2]`."""
    axis = (torch.arange(96) + 0.5) / 96 * 3.2 - 1.6
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    result = []
    for shape in range(len(SHAPES)):
        for turn in range(turns):
            angle = 2 * math.pi * turn / turns
            u = x * math.cos(angle) + y * math.sin(angle)
            v = y * math.cos(angle) - x * math.sin(angle)
            mask = shape_distance(u, v, torch.tensor(shape)) < 0
            result.append(_normalise(mask.numpy(), side))
    return np.stack(result).reshape(len(SHAPES), turns, -1)


def _normalise(mask: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    """Centre a mask and scale it so that its spread is a fixed part of `side`."""
    rows, columns = np.nonzero(mask)
    cy, cx = rows.mean(), columns.mean()
    spread = math.sqrt(((rows - cy) ** 2 + (columns - cx) ** 2).mean()) + 1e-6
    grid = (np.arange(side) + 0.5 - side / 2) / (side / 2) * 2.3 * spread
    ys = np.rint(cy + grid).astype(int)
    xs = np.rint(cx + grid).astype(int)
    inside = ((ys >= 0) & (ys < mask.shape[0]))[:, None] & ((xs >= 0) & (xs < mask.shape[1]))
    picked = mask[np.clip(ys, 0, mask.shape[0] - 1)][:, np.clip(xs, 0, mask.shape[1] - 1)]
    return picked & inside


def name_shape(mask: NDArray[np.bool_]) -> str:
    """Name the shape whose template overlaps a mask `[H, W]` best at any angle."""
    candidate = _normalise(mask, 32).reshape(-1)
    templates = _templates()
    union = (templates | candidate).sum(-1)
    overlap = (templates & candidate).sum(-1) / np.maximum(union, 1)
    return SHAPES[int(overlap.max(1).argmax())]


def name_direction(masks: NDArray[np.bool_]) -> str:
    """Name where the centre of `masks [T, H, W]` goes from the first to the last fifth."""
    moments = []
    for mask in masks:
        rows, columns = np.nonzero(mask)
        if len(rows):
            moments.append((columns.mean() / mask.shape[1], rows.mean() / mask.shape[0]))
    if len(moments) < 5:
        return "still"
    path = np.array(moments)
    fifth = max(1, len(path) // 5)
    dx, dy = path[-fifth:].mean(0) - path[:fifth].mean(0)
    if max(abs(dx), abs(dy)) < STILL:
        return "still"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def _typical(values: list) -> object:
    return max(set(values), key=values.count) if values else None


def check_group(
    frames: NDArray[np.float32], group: Group, *, others: tuple[str, ...] = ()
) -> Verdict:
    """Compare a clip with one group of its description.

    Args:
        frames: `[T, H, W, 3]` in [0, 1].
        group: what the prompt asked for.
        others: colours of the prompt's other groups, which may also be there.
    """
    names = list(COLOURS)
    colours = colour_map(frames)
    areas = np.bincount(colours[colours >= 0], minlength=len(names)).astype(float)
    for other in others:
        areas[names.index(other)] = 0.0
    wanted = names.index(group.colour)
    present = areas[wanted] > 0.002 * colours.size
    masks = colours == wanted
    middle = range(len(frames) // 4, max(len(frames) // 4 + 1, 3 * len(frames) // 4), 3)
    found = [parts(masks[t]) for t in middle]
    shapes = [name_shape(spots[0]) for spots in found if spots and spots[0].sum() > 20]
    return Verdict(
        colour=bool(present and areas.argmax() == wanted),
        direction=present and name_direction(masks) == group.direction,
        count=_typical([len(spots) for spots in found]) == group.count,
        shape=_typical(shapes) == group.shape,
    )
