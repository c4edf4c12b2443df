"""Random plans, and attention by brute force, for the tests of block-sparse attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def random_runs(
    shape: tuple[int, int, int], keys: int, runs: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw, for each of `[B, H, T]` tiles, 0 to `runs` disjoint ascending runs of any length."""
    starts = torch.zeros(math.prod(shape), runs, dtype=torch.int32)
    lengths = torch.zeros_like(starts)
    for i in range(starts.shape[0]):
        count = int(torch.randint(0, runs + 1, (), generator=generator))
        edges = torch.randperm(keys + 1, generator=generator)[: 2 * count].sort().values
        count = len(edges) // 2
        starts[i, :count] = edges[: 2 * count : 2]
        lengths[i, :count] = edges[1 : 2 * count : 2] - edges[: 2 * count : 2]
    return starts.view(*shape, runs), lengths.view(*shape, runs)


def runs_of_blocks(
    sizes: list[int], kept: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Turn kept blocks, bool `[B, H, T, C]`, into one run for each block that is not empty."""
    edges = torch.tensor([0, *sizes]).cumsum(0)
    starts = torch.zeros(kept.shape, dtype=torch.int32)
    lengths = torch.zeros_like(starts)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in kept.shape[:3])).tolist():
        chosen = [c for c in range(len(sizes)) if kept[tuple(place)][c] and sizes[c]]
        for slot, c in enumerate(chosen):
            starts[(*place, slot)] = edges[c]
            lengths[(*place, slot)] = sizes[c]
    return starts, lengths


def permutations(shape: tuple[int, ...], length: int, generator: torch.Generator) -> Tensor:
    """Draw one permutation of `length` for each entry of `shape`, int32."""
    rows = [torch.randperm(length, generator=generator) for _ in range(math.prod(shape))]
    return torch.stack(rows).view(*shape, length).int()


def random_call(
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    heads: int = 2,
    key_heads: int = 2,
    queries: int = 200,
    keys: int = 300,
    dim: int = 64,
    runs: int = 5,
    summaries: int = 0,
    ordered: bool = False,
    magnitude: float = 1.0,
    multiple: int = 1,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Draw the arguments of one call: positional ones, and keywords.

    Run lengths are multiples of `multiple`.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tiles = (queries + 127) // 128
    arguments = [
        normal(batch, heads, queries, dim) * magnitude,
        normal(batch, key_heads, keys, dim),
        normal(batch, key_heads, keys, dim),
        *random_runs((batch, heads, tiles), keys, runs, generator),
    ]
    arguments[4] -= arguments[4] % multiple
    used_first = (arguments[4] == 0).int().argsort(dim=-1, stable=True)
    arguments[3:] = [x.gather(-1, used_first) for x in arguments[3:]]
    keywords: dict[str, Any] = {}
    if ordered:
        keywords["query_order"] = permutations((batch, heads), queries, generator)
        keywords["tile_order"] = permutations((), batch * heads * tiles, generator).view(-1)
    if summaries:
        weights = torch.randn(batch, heads, tiles, summaries, generator=generator)
        weights[torch.rand(weights.shape, generator=generator) < 0.4] = -torch.inf
        keywords["summary"] = (
            normal(batch, key_heads, summaries, dim),
            normal(batch, key_heads, summaries, dim),
            weights,
        )
    return arguments, keywords


def brute_force(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    run_starts: Tensor,
    run_lengths: Tensor,
    *,
    query_order: Tensor | None = None,
    summary: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute output and log-sum-exp query by query, listing each one's keys; fp64, on the CPU.

    A row that reads nothing gives 0. Summary rows of weight minus infinity are not read.
    """
    batch, heads, length, width = query.shape
    scale = width**-0.5 if scale is None else scale
    group = heads // key.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            order = range(length) if query_order is None else query_order[b, h].tolist()
            for position, token in enumerate(order):
                tile = position // 128
                keys, values = [], []
                for start, rows in zip(
                    run_starts[b, h, tile].tolist(), run_lengths[b, h, tile].tolist(), strict=True
                ):
                    keys.append(key[b, h // group, start : start + rows])
                    values.append(value[b, h // group, start : start + rows])
                bias = torch.zeros(sum(len(x) for x in keys), dtype=torch.float64)
                if summary is not None:
                    log_weights = summary[2][b, h, tile].double()
                    used = log_weights > -torch.inf
                    keys.append(summary[0][b, h // group][used])
                    values.append(summary[1][b, h // group][used])
                    bias = torch.cat((bias, log_weights[used]))
                logits = torch.cat(keys).double() @ query[b, h, token].double() * scale + bias
                lse[b, h, token] = torch.logsumexp(logits, 0)
                if lse[b, h, token] != -torch.inf:
                    weights = (logits - lse[b, h, token]).exp()
                    out[b, h, token] = weights @ torch.cat(values).double()
    return out, lse


OUTPUT_LAYOUTS = ("token-major", "heads of a longer tensor", "not aligned")


def output_layout(name: str, query: Tensor) -> tuple[Tensor, Tensor]:
    """Return a view to write an output to, and the tensor behind it, which is all NaN."""
    batch, heads, length, width = query.shape
    shape = {
        "token-major": (batch, length, heads, width),
        "heads of a longer tensor": (batch, heads + 1, length + 3, width),
        "not aligned": (batch, length, heads, width + 1),
    }[name]
    whole = torch.full(shape, torch.nan, dtype=query.dtype, device=query.device)
    if name == "heads of a longer tensor":
        return whole[:, 1:, 2 : 2 + length], whole
    return whole[..., -width:].transpose(1, 2), whole


def spoil(
    arguments: list[Tensor],
    keywords: dict[str, Any],
    generator: torch.Generator,
    values: tuple[float, ...] = (torch.nan, torch.inf),
) -> None:
    """Put NaN and infinity into a few queries, keys, values and summaries, in place.

    Args:
        arguments: of `random_call`.
        keywords: of `random_call`.
        generator: draws the rows.
        values: what the value rows get.
    """

    def rows(x: Tensor, spoils: tuple[float, ...]) -> None:
        for spoil in spoils:
            b, h, row, column = (
                int(torch.randint(0, size, (), generator=generator)) for size in x.shape
            )
            x[b, h, row, column] = spoil

    query, key, value = arguments[:3]
    everything = (torch.nan, torch.inf, -torch.inf)
    rows(query, everything)
    rows(key, everything)
    rows(value, values)
    if "summary" in keywords:
        keys, means, log_weights = keywords["summary"]
        # Rows that one tile uses and another leaves out.
        keys[:, :, 0, 0] = torch.nan
        means[:, :, 1, 0] = torch.nan
        log_weights[:, :, ::2, :2] = -torch.inf


def assert_spoiled_alike(actual: Tensor, exact: Tensor, tolerance: float) -> None:
    """Fail unless `actual` is finite, and right, wherever the plain formula's `exact` is."""
    finite = torch.isfinite(exact)
    assert finite.any(), "nothing would be compared"
    assert not finite.all(), "nothing was spoiled"
    torch.testing.assert_close(
        actual[finite].double(), exact[finite], rtol=tolerance, atol=tolerance
    )
    assert actual[exact.isnan()].isnan().all(), "what is not a number must not look like one"
    assert not actual[exact.isinf()].isfinite().any()
