"""FLIP: how much of a difference a person sees who flips between two pictures.

Both pictures are blurred as an eye at a distance blurs them, compared in a perceptually uniform
colour space, and the difference is raised where edges or points differ.

Source: Andersson et al. 2020, FLIP: A Difference Evaluator for Alternating Images, Proceedings of
the ACM on Computer Graphics and Interactive Techniques 3(2), for pictures of low dynamic range.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

__all__ = ["PIXELS_PER_DEGREE", "flip"]

# 0.7 m before a screen 0.7 m wide of 3,840 pixels.
PIXELS_PER_DEGREE = 0.7 * (3840 / 0.7) * math.pi / 180
# Sums of a Gaussian or two, `a sqrt(pi / b) exp(-pi^2 r^2 / b)` with r in degrees, that fit the
# contrast sensitivity of the eye: brightness, red to green, blue to yellow.
_SENSITIVITY = (((1.0, 0.0047),), ((1.0, 0.0053),), ((34.1, 0.04), (13.5, 0.025)))
_FEATURE_DEGREES = 0.082
_COLOUR_POWER, _FEATURE_POWER = 0.7, 0.5
_KNEE, _KNEE_VALUE = 0.4, 0.95
# Linear sRGB to XYZ; a row's sum is the white point.
_XYZ = (
    (10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794),
    (2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897),
    (1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382),
)


def flip(test: Tensor, reference: Tensor, *, ppd: float = PIXELS_PER_DEGREE) -> Tensor:
    """Return the mean FLIP of each picture, 0 (no difference) to 1.

    Args:
        test: sRGB `[N, 3, H, W]`, floating point in 0..1.
        reference: as `test`.
        ppd: pixels per degree of the field of view.

    Returns:
        `[N]`, on the device of `test`.

    Raises:
        ValueError: if these are not two stacks of pictures of one shape.
    """
    if test.shape != reference.shape or test.ndim != 4 or test.shape[1] != 3:
        raise ValueError(
            f"FLIP compares [N, 3, H, W] with the same, got {tuple(test.shape)} and "
            f"{tuple(reference.shape)}"
        )
    ours, theirs = (_opponent(_linear(x)) for x in (test, reference))
    colour = _colour_difference(ours, theirs, ppd)
    feature = _feature_difference(ours[:, :1], theirs[:, :1], ppd)
    return (colour ** (1 - feature)).flatten(1).mean(dim=1)


def _colour_difference(ours: Tensor, theirs: Tensor, ppd: float) -> Tensor:
    """Return `[N, 1, H, W]` in 0..1: how far the blurred colours are apart."""
    seen = [_hunt(_lab(_xyz_of(_blur(x, ppd)))) for x in (ours, theirs)]
    largest = _largest(ours)
    error = _distance(*seen) ** _COLOUR_POWER
    knee = _KNEE * largest
    above = _KNEE_VALUE + (error - knee) / (largest - knee) * (1 - _KNEE_VALUE)
    return torch.where(error < knee, _KNEE_VALUE / knee * error, above)


def _feature_difference(ours: Tensor, theirs: Tensor, ppd: float) -> Tensor:
    """Return `[N, 1, H, W]` in 0..1: how much more of an edge or a point one picture has."""
    smooth, edge, point = (x.to(ours) for x in _features(ppd))
    found = []
    for kernel in (edge, point):
        ends = [
            torch.hypot(_separable(x, smooth, kernel), _separable(x, kernel, smooth))
            for x in ((ours + 16) / 116, (theirs + 16) / 116)
        ]
        found.append((ends[0] - ends[1]).abs())
    return (torch.maximum(*found) / math.sqrt(2)).clamp(0, 1) ** _FEATURE_POWER


def _blur(opponent: Tensor, ppd: float) -> Tensor:
    """Blur each channel as the eye does."""
    widest = max(b for terms in _SENSITIVITY for _, b in terms)
    radius = math.ceil(3 * math.sqrt(widest / (2 * math.pi**2)) * ppd)
    places = torch.arange(-radius, radius + 1, dtype=torch.float64) / ppd
    blurred = []
    for channel, terms in enumerate(_SENSITIVITY):
        shapes = [(-((math.pi * places) ** 2) / b).exp() for _, b in terms]
        heights = [a * math.sqrt(math.pi / b) for a, b in terms]
        weight = sum(h * float(s.sum()) ** 2 for h, s in zip(heights, shapes, strict=True))
        part = opponent[:, channel : channel + 1]
        sums = [
            _separable(part, s.to(part), s.to(part)) * (h / weight)
            for h, s in zip(heights, shapes, strict=True)
        ]
        blurred.append(sum(sums[1:], sums[0]))
    return torch.cat(blurred, dim=1)


@lru_cache(maxsize=8)
def _features(ppd: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return a Gaussian, its first and its second derivative, each side of them of sum 1."""
    deviation = 0.5 * _FEATURE_DEGREES * ppd
    radius = math.ceil(3 * deviation)
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    gauss = (-(x**2) / (2 * deviation**2)).exp()
    edge, point = -x * gauss, (x**2 / deviation**2 - 1) * gauss
    sides = [torch.where(k < 0, k / -k[k < 0].sum(), k / k[k > 0].sum()) for k in (edge, point)]
    return gauss / gauss.sum(), sides[0], sides[1]


def _separable(picture: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """Convolve `[N, 1, H, W]` with the outer product of two kernels; borders are repeated."""
    size = len(row) // 2
    wide = pad(picture, (size, size, 0, 0), mode="replicate")
    wide = conv2d(wide, row.view(1, 1, 1, -1))
    tall = pad(wide, (0, 0, size, size), mode="replicate")
    return conv2d(tall, column.view(1, 1, -1, 1))


def _linear(srgb: Tensor) -> Tensor:
    return torch.where(srgb > 0.04045, ((srgb + 0.055) / 1.055) ** 2.4, srgb / 12.92)


def _matrix(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return linear sRGB to XYZ, and the white point `[3, 1, 1]`."""
    matrix = like.new_tensor(_XYZ)
    return matrix, matrix.sum(dim=1).view(3, 1, 1)


def _opponent(rgb: Tensor) -> Tensor:
    """Return brightness, red to green and yellow to blue of linear sRGB, before any root."""
    matrix, white = _matrix(rgb)
    x, y, z = (torch.einsum("ij,njhw->nihw", matrix, rgb) / white).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def _xyz_of(opponent: Tensor) -> Tensor:
    """Return XYZ, relative to white, of what a display can show of these colours."""
    y = (opponent[:, 0] + 16) / 116
    x, z = y + opponent[:, 1] / 500, y - opponent[:, 2] / 200
    matrix, white = _matrix(opponent)
    rgb = torch.einsum(
        "ij,njhw->nihw", matrix.double().inverse().to(matrix), torch.stack([x, y, z], 1) * white
    )
    return torch.einsum("ij,njhw->nihw", matrix, rgb.clamp(0, 1)) / white


def _lab(xyz: Tensor) -> Tensor:
    """Return CIE L*a*b* of XYZ relative to white."""
    bend = 6 / 29
    root = xyz.clamp_min(bend**3) ** (1 / 3)
    x, y, z = torch.where(xyz > bend**3, root, xyz / (3 * bend**2) + 4 / 29).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def _hunt(lab: Tensor) -> Tensor:
    """Weaken colours where it is dark, as the eye does."""
    light = lab[:, :1]
    return torch.cat([light, 0.01 * light * lab[:, 1:]], dim=1)


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Return the HyAB distance: that of brightness plus that of colour."""
    apart = one - other
    return apart[:, :1].abs() + torch.hypot(apart[:, 1:2], apart[:, 2:3])


def _largest(like: Tensor) -> Tensor:
    """Return the largest error that there is, between pure green and pure blue."""
    green, blue = (like.new_tensor(c).view(1, 3, 1, 1) for c in ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
    ends = [_hunt(_lab(_xyz_of(_opponent(c)))) for c in (green, blue)]
    return _distance(*ends) ** _COLOUR_POWER
