"""Text before, after or without: always exact, and its padding never leaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from svg_attention import (
    SVG1,
    SVG2,
    Dense,
    LayerMemory,
    RandomBlocks,
    TokenLayout,
    sparse_attention,
)

METHODS = [
    Dense(),
    SVG1(density=0.6),
    SVG2(density=0.5, q_clusters=8, k_clusters=24, first_iterations=4),
    SVG2(
        density=0.5,
        q_clusters=8,
        k_clusters=24,
        first_iterations=4,
        compensate=True,
        route="error",
    ),
    SVG2(top_p=0.5, min_keep=0.0, q_clusters=8, k_clusters=24, first_iterations=4),
    RandomBlocks(density=0.6),
]
NAMES = ["dense", "svg1", "svg2", "svg2-error", "svg2-top-p", "random"]
# Text that ends inside the tile where the video ends, and text that fills tiles of its own.
GRIDS = [((4, 10, 11), 30), ((4, 8, 16), 300)]


def attend(
    method: Any, layout: TokenLayout, data: tuple[Tensor, ...], lengths: Tensor | None
) -> Tensor:
    plan = method.plan(
        *data,
        layout=layout,
        memory=LayerMemory(),
        text_lengths=lengths,
        generator=torch.Generator().manual_seed(0),
    )
    return sparse_attention(*data, plan, backend="reference")


def valid_rows(layout: TokenLayout, length: int) -> Tensor:
    place = torch.arange(layout.tokens) - layout.text_start
    return (
        (place < length) | (place >= layout.text_tokens)
        if layout.text_position == "first"
        else (place < length)
    )


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize(("grid", "text"), GRIDS)
@pytest.mark.parametrize("position", ["first", "last"])
def test_plan_never_leaks_padding(
    method: Any,
    grid: tuple[int, int, int],
    text: int,
    position: str,
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    layout = TokenLayout(grid=grid, text_tokens=text, text_position=position)
    lengths = torch.tensor([9, 0])
    data = clustered(layout, batch=2)
    clean = attend(method, layout, data, lengths)
    assert clean.isfinite().all()
    poisoned = tuple(x.clone() for x in data)
    for item, length in enumerate(lengths.tolist()):
        padding = ~valid_rows(layout, length)
        for x in poisoned:
            x[item, :, padding] = 1e4
    dirty = attend(method, layout, poisoned, lengths)
    for item, length in enumerate(lengths.tolist()):
        rows = valid_rows(layout, length)
        assert torch.equal(clean[item, :, rows], dirty[item, :, rows])


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize(("grid", "text"), GRIDS)
def test_plan_does_not_depend_on_padding_tokens(
    method: Any,
    grid: tuple[int, int, int],
    text: int,
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    padded = TokenLayout(grid=grid, text_tokens=text)
    tight = TokenLayout(grid=grid, text_tokens=9)
    data = clustered(padded)
    out = attend(method, padded, data, torch.tensor([9]))
    cut = tuple(x[:, :, : tight.tokens] for x in data)
    expected = attend(method, tight, cut, None)
    assert torch.allclose(out[:, :, : tight.tokens], expected, atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize(("grid", "text"), GRIDS)
@pytest.mark.parametrize("position", ["first", "last"])
def test_plan_keeps_text_rows_and_columns_exact(
    method: Any,
    grid: tuple[int, int, int],
    text: int,
    position: str,
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    layout = TokenLayout(grid=grid, text_tokens=text, text_position=position)
    data = clustered(layout)
    plan = method.plan(*data, layout=layout, memory=LayerMemory())
    mask = plan.to_mask()[0]
    rows = slice(layout.text_start, layout.text_start + text)
    assert mask[:, rows].all()
    assert mask[:, :, rows].all()
    exact = torch.nn.functional.scaled_dot_product_attention(*data)
    out = sparse_attention(*data, plan)
    assert torch.allclose(out[:, :, rows], exact[:, :, rows], atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize(("grid", "text"), GRIDS)
def test_plan_does_not_depend_on_the_place_of_the_text(
    method: Any,
    grid: tuple[int, int, int],
    text: int,
    clustered: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    last = TokenLayout(grid=grid, text_tokens=text)
    first = TokenLayout(grid=grid, text_tokens=text, text_position="first")
    data = clustered(last)
    turned = tuple(torch.roll(x, text, dims=2) for x in data)
    lengths = torch.tensor([text - 5])
    out, other = attend(method, last, data, lengths), attend(method, first, turned, lengths)
    valid = slice(0, last.tokens - 5)
    assert torch.allclose(
        torch.roll(other, -text, dims=2)[:, :, valid], out[:, :, valid], atol=1e-5
    )
