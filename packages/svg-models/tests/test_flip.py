"""FLIP against closed forms and against its authors' own program."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from svg_models.video.flip import flip

pytestmark = pytest.mark.usefixtures("one_thread")


def pattern(height: int, width: int, rows: int, columns: int, levels: int) -> Tensor:
    """Return blocks of colours, `[1, 3, H, W]`, that whole numbers alone decide."""
    y, x, c = np.ogrid[:height, :width, :3]
    blocks = ((y // rows * 7 + x // columns * 5 + c * 3) % levels) / (levels - 1)
    return torch.from_numpy(blocks.astype(np.float32)).permute(2, 0, 1)[None]


def flat(*colour: float, side: int = 24) -> Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, side, side).clone()


# What flip-evaluator 1.7, by the authors of the paper, gives for the same pictures.
KNOWN = [
    ((40, 56), (8, 8, 11), (6, 8, 11), 0.7485769987),
    ((33, 70), (4, 16, 7), (4, 15, 7), 0.3520413339),
    ((64, 64), (16, 16, 5), (16, 16, 6), 0.8854384422),
    ((24, 24), (1, 1, 23), (2, 1, 23), 0.3362385035),
    ((20, 90), (5, 9, 9), (5, 9, 13), 0.8282365203),
]


@pytest.mark.parametrize(("size", "one", "other", "expected"), KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flip_is_that_of_its_authors(
    size: tuple[int, int],
    one: tuple[int, int, int],
    other: tuple[int, int, int],
    expected: float,
    dtype: torch.dtype,
) -> None:
    pictures = [pattern(*size, *blocks).to(dtype) for blocks in (one, other)]
    assert flip(*pictures).item() == pytest.approx(expected, abs=3e-6)


def test_flip_takes_the_distance_of_the_viewer() -> None:
    a, b = pattern(40, 56, 8, 8, 11), pattern(40, 56, 6, 8, 11)
    assert flip(a, b, ppd=30.0).item() == pytest.approx(0.7575153708, abs=3e-6)


def test_flip_of_pure_green_and_pure_blue_is_the_largest() -> None:
    assert flip(flat(0, 1, 0), flat(0, 0, 1)).item() == pytest.approx(1.0, abs=1e-6)
    assert flip(flat(0.3, 0.2, 0.9), flat(0.3, 0.2, 0.9)).item() == 0.0


def lightness(grey: float) -> float:
    linear = ((grey + 0.055) / 1.055) ** 2.4 if grey > 0.04045 else grey / 12.92
    return 116 * linear ** (1 / 3) - 16 if linear > (6 / 29) ** 3 else linear * (29 / 3) ** 3


@pytest.mark.parametrize(("one", "other"), [(0.5, 0.52), (0.2, 0.8), (0.0, 1.0), (0.01, 0.03)])
def test_flip_of_flat_greys_is_the_closed_form(one: float, other: float) -> None:
    # Nothing but lightness differs, blurring changes nothing, and there is no edge.
    largest = _largest()
    error, knee = abs(lightness(one) - lightness(other)) ** 0.7, 0.4 * largest
    expected = (
        0.95 / knee * error if error < knee else 0.95 + (error - knee) / (largest - knee) * 0.05
    )
    got = flip(flat(one, one, one).double(), flat(other, other, other).double()).item()
    assert got == pytest.approx(expected, abs=1e-5)


def _largest() -> float:
    """Compute the error between pure green and pure blue with plain numbers."""
    ends = []
    rows = (
        (10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794),
        (2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897),
        (1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382),
    )
    for column in (1, 2):
        x, y, z = (row[column] / sum(row) for row in rows)
        x, y, z = (
            v ** (1 / 3) if v > (6 / 29) ** 3 else v / (3 * (6 / 29) ** 2) + 4 / 29
            for v in (x, y, z)
        )
        light = 116 * y - 16
        ends.append((light, 0.01 * light * 500 * (x - y), 0.01 * light * 200 * (y - z)))
    apart = [abs(a - b) for a, b in zip(*ends, strict=True)]
    return float((apart[0] + (apart[1] ** 2 + apart[2] ** 2) ** 0.5) ** 0.7)


def test_flip_measures_each_picture_by_itself() -> None:
    a = torch.cat([pattern(40, 56, 8, 8, 11), flat(0, 1, 0, side=56)[:, :, :40]])
    b = torch.cat([pattern(40, 56, 6, 8, 11), flat(0, 0, 1, side=56)[:, :, :40]])
    assert flip(a, b).tolist() == pytest.approx([0.7485769987, 1.0], abs=3e-6)
    assert torch.equal(flip(a, b), flip(b, a))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 8, 9)])
def test_flip_refuses_what_are_no_pictures_of_one_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"FLIP compares \[N, 3, H, W\]"):
        flip(torch.zeros(shape), torch.zeros(1, 3, 8, 8))
