"""Attention in e4m3 step by step, for the tests: what the compiled kernel computes, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from svg_kernels import Fp8KeyValue
from svg_kernels.key_value_fp8.rows import DTYPE, LARGEST, rotate

STAGE_ROWS = 128
WARP_ROWS, WARPGROUP_ROWS = 16, 64
ATOM_ROWS = 8
MAXIMUM_LOG2 = 3.0
"""What a row's maximum stands at, in units of log 2, when it is set."""
LARGEST_LOWERED = 2.0**100
"""Sums above which probabilities may be infinite in fp32, and are computed once more."""


_NEAR = 2e-3
"""What two ways to rotate a query differ by at most, where its largest element is 448."""


def to_e4m3(x: Tensor) -> Tensor:
    """Round to e4m3, what is too large to the largest number; fp64."""
    return x.float().clamp(-LARGEST, LARGEST).to(DTYPE).double()


def attend_in_e4m3(
    query: Tensor,
    key_value: Fp8KeyValue,
    run_starts: Tensor,
    run_lengths: Tensor,
    *,
    query_order: Tensor | None = None,
    summary: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute output and log-sum-exp tile by tile, rounding what the compiled kernel rounds.

    Sums are in fp64, so what the tensor cores cut off is not in it.
    """
    batch, heads, length, width = query.shape
    scale = width**-0.5 if scale is None else scale
    group = heads // key_value.key.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float64, device=query.device)
    order = torch.arange(length, device=query.device)
    for b in range(batch):
        for h in range(heads):
            head = HeadInE4m3(key_value, b, h // group, scale)
            if query_order is not None:
                order = query_order[b, h].long()
            for t in range(run_starts.shape[2]):
                tokens = order[t * 128 : (t + 1) * 128]
                runs = zip(run_starts[b, h, t].tolist(), run_lengths[b, h, t].tolist(), strict=True)
                extra = None
                if summary is not None:
                    keys, values, weights = summary
                    extra = (keys[b, h // group], values[b, h // group], weights[b, h, t])
                found = head.attend(query[b, h, tokens], list(runs), extra)
                out[b, h, tokens], lse[b, h, tokens] = found
    return out, lse


class HeadInE4m3:
    """The keys and values of one head, and attention of one tile of queries over them."""

    def __init__(self, key_value: Fp8KeyValue, batch: int, head: int, scale: float) -> None:
        at = (batch, head)
        self.scale = scale
        self.key, self.value = key_value.key[at].double(), key_value.value[at].double()
        self.key_scale = key_value.key_scale[at].double()
        self.key_mean = key_value.key_mean[at].double()
        self.value_scale = key_value.value_scale[at].double()
        self.value_mean = key_value.value_mean[at].double()

    def attend(
        self,
        query: Tensor,
        runs: list[tuple[int, int]],
        summary: tuple[Tensor, Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Return output `[M, 128]` and log-sum-exp `[M]` of a tile of M rows."""
        rotated = rotate(query.float() * self.key_scale.float())
        largest = rotated.abs().amax(dim=1, keepdim=True)
        largest = torch.where(largest > 0, largest, 1.0)
        bytes_ = to_e4m3(rotated * (LARGEST / largest))
        unit = largest.double() / LARGEST * self.scale / math.log(2)
        maximum = torch.full_like(unit, -torch.inf)
        total, out = torch.zeros_like(unit), torch.zeros(query.shape, dtype=torch.float64)
        out = out.to(query.device)
        for rows, counts in stages(runs, self.key.shape[0], query.device):
            scores = bytes_ @ self.key[rows].T * unit
            scores[:, ~counts] = -torch.inf
            raised = raise_maximum(maximum, scores)
            correction = torch.exp2(maximum - finite(raised))
            maximum = raised
            p = torch.exp2(scores - shift(maximum))
            total = total * correction + p.sum(dim=1, keepdim=True)
            out = out * correction + to_e4m3(p) @ self.value[rows]
        out = out * self.value_scale
        if summary is not None:
            keys, values, weights = summary
            keys = (keys.float() - self.key_mean.float()).to(query.dtype).double()
            values = (values.float() - self.value_mean.float()).to(query.dtype).double()
            scores = query.double() @ keys.T * self.scale + weights.double()
            scores = scores / math.log(2)
            raised = torch.maximum(maximum, scores.amax(dim=1, keepdim=True))
            correction = torch.exp2(maximum - finite(raised))
            maximum = raised
            p = torch.exp2(scores - shift(maximum))
            total = total * correction + p.sum(dim=1, keepdim=True)
            out = out * correction + p @ values
        reads = total > 0
        out = torch.where(reads, out / total.clamp_min(1e-300) + self.value_mean, 0.0)
        lse = (shift(maximum) * math.log(2) + total.log())[:, 0]
        lse = lse + query.double() @ self.key_mean * self.scale
        return out, torch.where(reads[:, 0], lse, -torch.inf)


def at_ties(query: Tensor, key_value: Fp8KeyValue) -> tuple[Tensor, Tensor]:
    """Return which queries another order of sums may round otherwise, and what that does.

    That is by how much a score of each moves at most when it happens to one element, for the
    default scale. Such elements lie within `_NEAR` of the middle between two numbers of e4m3. These
    are at most 32 apart; where they are less than one apart, that moves no score visibly.

    Args:
        query: `[B, Hq, S, 128]`.
        key_value: of `[B, Hk, L, 128]`.

    Returns:
        Bool and fp64, `[B, Hq, S]`.
    """
    group = query.shape[1] // key_value.key.shape[1]
    scale, key = (x.repeat_interleave(group, 1) for x in (key_value.key_scale, key_value.key))
    rotated = rotate(query.float() * scale[:, :, None].float()).double()
    largest = rotated.abs().amax(-1, keepdim=True)
    places = rotated * (LARGEST / largest.clamp_min(1e-300))
    splits = to_e4m3(places - _NEAR) != to_e4m3(places + _NEAR)
    moves = largest[..., 0] * 32 / LARGEST * key.double().abs().amax((2, 3))[..., None] * 128**-0.5
    return (splits & (places.abs() >= 8)).any(-1), moves


def finite(maximum: Tensor) -> Tensor:
    """Return 0 for a maximum of minus infinity."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def shift(maximum: Tensor) -> Tensor:
    """Return what is taken from scores before they become exponents."""
    return torch.where(maximum == -torch.inf, 0.0, maximum - MAXIMUM_LOG2)


def raise_maximum(maximum: Tensor, scores: Tensor) -> Tensor:
    """Return the maxima `[M, 1]` of a tile's rows after a stage of scores.

    A warp in which a thread's sum is too large takes the true maxima; where sums are too large for
    fp32, or nothing has counted before, its warpgroup does.
    """
    sums = sums_of_threads(scores - shift(maximum))
    lost = (sums > LARGEST_LOWERED) | (maximum == -torch.inf)[:, 0]
    raises = of_groups(sums > LARGEST, WARP_ROWS) | of_groups(lost, WARPGROUP_ROWS)
    highest = scores.amax(dim=1, keepdim=True)
    return torch.where(raises, torch.maximum(maximum, highest), maximum)


def sums_of_threads(exponents: Tensor) -> Tensor:
    """Return of each row the largest sum of a thread, which has two of each eight columns."""
    return torch.exp2(exponents).view(len(exponents), -1, 4, 2).sum(dim=(1, 3)).amax(dim=1)


def of_groups(rows: Tensor, size: int) -> Tensor:
    """Return, `[M, 1]`, which rows belong to a group of `size` that has one of `rows`."""
    return torch.cat([part.any().expand(len(part)) for part in rows.split(size)])[:, None]


def stages(
    runs: list[tuple[int, int]], keys: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Return the key rows of each stage of 128, and which of them count.

    A run takes atoms of eight rows of its own.
    """
    rows, counts = [], []
    for start, length in runs:
        taken = -(-length // ATOM_ROWS) * ATOM_ROWS
        rows += range(start, start + taken)
        counts += [i < length for i in range(taken)]
    if not rows:
        return []
    missing = -len(rows) % STAGE_ROWS
    rows += [0] * missing
    counts += [False] * missing
    all_rows = torch.tensor(rows, dtype=torch.long, device=device).clamp(max=keys - 1)
    all_counts = torch.tensor(counts, dtype=torch.bool, device=device)
    return list(zip(all_rows.split(STAGE_ROWS), all_counts.split(STAGE_ROWS), strict=True))


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
