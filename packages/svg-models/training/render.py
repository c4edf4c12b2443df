"""Draw scenes as antialiased video with signed distance functions, a whole batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .clips import (
    BACKGROUNDS,
    CAMERAS,
    CLIP_FRAMES,
    COLOURS,
    MAX_OBJECTS,
    PATTERNS,
    SHAPES,
    TEXTURES,
    Scene,
)

_BODY = 13  # shape, texture, red, green, blue, x, y, speed_x, speed_y, radius, angle, spin, drawn
_STAGE = 8  # red, green, blue, pattern, phase_x, phase_y, pan, zoom
DARK = 0.45  # the second tone of a texture, as a fraction of its colour


class Params(NamedTuple):
    """Scenes as numbers: `bodies [B, 4, 13]` and `stage [B, 8]`, fp32."""

    bodies: Tensor
    stage: Tensor

    def to(self, device: torch.device | str) -> Params:
        """Copy both tensors to a device."""
        return Params(*(t.to(device, non_blocking=True) for t in self))


def parameters(scenes: Sequence[Scene]) -> Params:
    """Turn scenes into the tensors that `render` draws from."""
    bodies = torch.zeros(len(scenes), MAX_OBJECTS, _BODY)
    bodies[..., 9] = 0.1
    stage = torch.zeros(len(scenes), _STAGE)
    for b, scene in enumerate(scenes):
        pan, zoom = CAMERAS[scene.camera]
        pattern = PATTERNS.index(scene.pattern)
        stage[b] = torch.tensor([*BACKGROUNDS[scene.background], pattern, *scene.phase, pan, zoom])
        for i, body in enumerate(scene.bodies):
            group = body.group
            kind = (SHAPES.index(group.shape), TEXTURES.index(group.texture))
            path = (body.x, body.y, body.speed_x, body.speed_y, body.radius)
            bodies[b, i] = torch.tensor(
                [*kind, *COLOURS[group.colour], *path, body.angle, body.spin, 1.0]
            )
    return Params(bodies, stage)


def _polygon(x: Tensor, y: Tensor, sides: int, inner: float) -> Tensor:
    distance = torch.full_like(x, -1e9)
    for i in range(sides):
        angle = 2 * math.pi * i / sides + math.pi / 2
        distance = torch.maximum(distance, x * math.cos(angle) + y * math.sin(angle) - inner)
    return distance


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Measure to a five-pointed star: fold the plane into one half point, then one edge."""
    sector = math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (torch.remainder(angle + sector, 2 * sector) - sector).abs()
    length = torch.sqrt(x * x + y * y + 1e-12)
    px, py = length * torch.sin(folded), length * torch.cos(folded)
    outer, inner = 1.12, 0.50
    tip_x, tip_y = 0.0, outer
    notch_x, notch_y = inner * math.sin(sector), inner * math.cos(sector)
    edge_x, edge_y = notch_x - tip_x, notch_y - tip_y
    norm = math.hypot(edge_x, edge_y)
    return ((py - tip_y) * edge_x - (px - tip_x) * edge_y) / norm


def _heart(x: Tensor, y: Tensor) -> Tensor:
    px, py = x.abs() / 1.55, (0.80 - y) / 1.55
    lobe = torch.sqrt((px - 0.25) ** 2 + (py - 0.75) ** 2 + 1e-12) - math.sqrt(2) / 4
    slide = 0.5 * (px + py).clamp_min(0.0)
    to_top = px**2 + (py - 1.0) ** 2
    to_side = (px - slide) ** 2 + (py - slide) ** 2
    body = torch.sqrt(torch.minimum(to_top, to_side) + 1e-12) * torch.sign(px - py)
    return torch.where(px + py > 1.0, lobe, body) * 1.55


def shape_distance(x: Tensor, y: Tensor, shape: Tensor) -> Tensor:
    """Measure from points to the outline of a shape of radius about 1; negative inside.

    Args:
        x: right of the centre, in radii.
        y: below the centre, in radii.
        shape: index into `SHAPES`, broadcast against `x`.
    """
    ax, ay = x.abs(), y.abs()
    length = torch.sqrt(x * x + y * y + 1e-12)
    arm = 0.36
    across = torch.maximum(ax - 1.05, ay - arm)
    upright = torch.maximum(ax - arm, ay - 1.05)
    distances = (
        length - 0.95,
        torch.maximum(ax, ay) - 0.86,
        _polygon(x, y - 0.18, 3, 0.62),
        _star(x, y),
        (length - 0.74).abs() - 0.27,
        torch.minimum(across, upright),
        _heart(x, y),
    )
    result = distances[0]
    for index, distance in enumerate(distances[1:], start=1):
        result = torch.where(shape == index, distance, result)
    return result


def _texture_edge(x: Tensor, y: Tensor, texture: Tensor) -> Tensor:
    """Signed distance in radii to where a texture turns dark; a large value for plain shapes."""
    period = 0.8
    stripes = (torch.remainder(x / period, 1.0) - 0.5).abs() * period - 0.25 * period
    gx = (torch.remainder(x / period + 0.5, 1.0) - 0.5) * period
    gy = (torch.remainder(y / period + 0.5, 1.0) - 0.5) * period
    dots = torch.sqrt(gx * gx + gy * gy + 1e-12) - 0.26 * period
    cell = 0.62
    wave = torch.sin(math.pi / cell * x) * torch.sin(math.pi / cell * y)
    checks = wave * cell / math.pi
    edge = torch.where(texture == 1, stripes, torch.full_like(x, 9.0))
    edge = torch.where(texture == 2, dots, edge)
    return torch.where(texture == 3, checks, edge)


def _view(stage: Tensor, t: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Map screen to world: `world = (screen - 1/2) / scale + 1/2 + pan * (t - 1/2)`."""
    pan, zoom = stage[:, 6].view(-1, 1, 1, 1), stage[:, 7].view(-1, 1, 1, 1)
    scale = torch.exp(zoom * (t - 0.5))
    return (u - 0.5) / scale + 0.5 + pan * (t - 0.5), (v - 0.5) / scale + 0.5, scale


def _backdrop(stage: Tensor, t: Tensor, u: Tensor, v: Tensor, pixel: float) -> Tensor:
    x, y, scale = _view(stage, t, u, v)
    pattern = stage[:, 3].view(-1, 1, 1, 1)
    x, y = x + stage[:, 4].view(-1, 1, 1, 1), y + stage[:, 5].view(-1, 1, 1, 1)
    cell = 0.17
    tiles = torch.sin(math.pi / cell * x) * torch.sin(math.pi / cell * y) * cell / math.pi
    slope = (x + y) * math.sqrt(0.5)
    lines = (torch.remainder(slope / cell, 1.0) - 0.5).abs() * cell - 0.32 * cell
    edge = torch.where(pattern == 1, tiles, lines)
    lit = (0.5 + edge * scale / pixel).clamp(0.0, 1.0) * (pattern > 0)
    colour = stage[:, :3].view(-1, 3, 1, 1, 1)
    step = torch.where(colour.mean(1, keepdim=True) < 0.3, 0.10, -0.10)
    return (colour + step * lit[:, None]) * 2.0 - 1.0


def _paint(
    canvas: Tensor, body: Tensor, stage: Tensor, t: Tensor, u: Tensor, v: Tensor, pixel: float
) -> Tensor:
    x, y, scale = _view(stage, t, u, v)
    shape, texture, red, green, blue, px, py, vx, vy, radius, angle, spin, drawn = (
        value.view(-1, 1, 1, 1) for value in body.unbind(-1)
    )
    x = (x - px - vx * (t - 0.5)) / radius
    y = (y - py - vy * (t - 0.5)) / radius
    theta = 2 * math.pi * (angle + spin * t)
    cos, sin = torch.cos(theta), torch.sin(theta)
    x, y = x * cos + y * sin, y * cos - x * sin
    sharp = radius * scale / pixel
    cover = (0.5 - shape_distance(x, y, shape) * sharp).clamp(0.0, 1.0) * drawn
    light = (0.5 + _texture_edge(x, y, texture) * sharp).clamp(0.0, 1.0)
    tone = (DARK + (1.0 - DARK) * light)[:, None]
    colour = torch.stack((red, green, blue), dim=1) * tone * 2.0 - 1.0
    return canvas + (colour - canvas) * cover[:, None]


@lru_cache(maxsize=2)
def _kernels(compiled: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    if compiled:
        return torch.compile(_backdrop, dynamic=True), torch.compile(_paint, dynamic=True)
    return _backdrop, _paint


def render(
    params: Params,
    *,
    num_frames: int,
    height: int,
    width: int,
    window: tuple[float, float, float] = (0.0, 0.0, 1.0),
    compiled: bool = False,
) -> Tensor:
    """Draw clips: `[B, 3, num_frames, height, width]` fp32 in [-1, 1].

    A speed is stated per 49 frames, so a shorter clip shows the middle of the longer one.

    Args:
        params: from `parameters`, on the device to draw on.
        num_frames: frames, at 1/48 of the motion each.
        height: pixels.
        width: pixels.
        window: left, top and side of the part of the frame to show (all of it by default).
        compiled: fuse the drawing with `torch.compile` (worth it on a GPU).
    """
    device = params.stage.device
    backdrop, paint = _kernels(compiled)
    side = min(height, width)
    left, top, extent = window
    frame = torch.arange(num_frames, device=device, dtype=torch.float32)
    t = (0.5 + (frame - (num_frames - 1) / 2) / (CLIP_FRAMES - 1)).view(1, -1, 1, 1)
    columns = torch.arange(width, device=device) + 0.5 - (width - side) / 2
    rows = torch.arange(height, device=device) + 0.5 - (height - side) / 2
    u = (left + extent * columns / side).view(1, 1, 1, -1)
    v = (top + extent * rows / side).view(1, 1, -1, 1)
    pixel = extent / side
    canvas = backdrop(params.stage, t, u, v, pixel)
    for body in params.bodies.unbind(1):
        canvas = paint(canvas, body, params.stage, t, u, v, pixel)
    return canvas
