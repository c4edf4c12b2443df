"""Rows that are hard to round, and how far an output is from what it should be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the error of a tensor relative to the norm of an exact one."""
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


Draw = Callable[[torch.Generator, int, int], tuple[Tensor, Tensor, Tensor]]


def normal(draw: torch.Generator, heads: int, tokens: int) -> list[Tensor]:
    """Draw queries, keys and values of unit variance, fp32 `[1, heads, tokens, 128]`."""
    device = draw.device
    shape = (1, heads, tokens, 128)
    return [torch.randn(shape, generator=draw, device=device) for _ in range(3)]


def random_rows(draw: torch.Generator, heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows whose scores have a deviation of one nat."""
    query, key, value = normal(draw, heads, tokens)
    return query, key, value


def offset_rows(draw: torch.Generator, heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows that lie far from zero: keys ten deviations, values three, in every channel."""
    query, key, value = normal(draw, heads, tokens)
    key += 10 * torch.randn(1, heads, 1, 128, generator=draw, device=draw.device)
    value += 3 * torch.randn(1, heads, 1, 128, generator=draw, device=draw.device)
    return query, key, value


def skewed_rows(draw: torch.Generator, heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows whose lengths differ by a factor of twenty and more."""
    query, key, value = normal(draw, heads, tokens)
    lengths = torch.randn(2, 1, heads, tokens, 1, generator=draw, device=draw.device).exp()
    return query, key * lengths[0] / 2, value * lengths[1]


def outlier_rows(draw: torch.Generator, heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows with one channel of keys and values 50 times as large as the others."""
    query, key, value = normal(draw, heads, tokens)
    key[..., 17] *= 50
    query[..., 17] /= 25
    value[..., 90] *= 50
    return query, key, value


def sharp_rows(draw: torch.Generator, heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows with scores up to about fifty nats."""
    query, key, value = normal(draw, heads, tokens)
    return query * 12, key, value


DATA: dict[str, Draw] = {
    "random": random_rows,
    "offset": offset_rows,
    "skewed": skewed_rows,
    "outlier": outlier_rows,
    "sharp": sharp_rows,
}
