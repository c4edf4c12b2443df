"""Correcting the rows of a head by matrices of its own, in Triton: read once, written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from svg_attention.planning.triton.launch import on

BLOCK_ROWS = 64
TILES = 8  # of rows that a program takes one after the other


@triton.jit
def correct_rows_kernel(
    out, query, constant, by_output, by_query,
    rows, heads, width, depth,
    out_b, out_h, out_s, query_b, query_h, query_s,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Correct `TILES` times `BLOCK_R` rows of one head."""
    sequence = tl.program_id(1).to(tl.int64)
    item, head = sequence // heads, sequence % heads
    v, d = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    square = (v < width)[:, None] & (v < width)[None, :]
    at = v[:, None] * width + v[None, :]
    from_output = tl.load(by_output + sequence * width * width + at, square, 0.0)
    at = d[:, None] * width + v[None, :]
    inside = (d < depth)[:, None] & (v < width)[None, :]
    from_query = tl.load(by_query + sequence * depth * width + at, inside, 0.0)
    added = tl.load(constant + sequence * width + v, v < width, 0.0).to(tl.float32)
    out += item * out_b + head * out_h
    query += item * query_b + head * query_h
    for tile in range(TILES):
        first = (tl.program_id(0).to(tl.int64) * TILES + tile) * BLOCK_R
        row = (first + tl.arange(0, BLOCK_R))[:, None]
        mask = (row < rows) & (v < width)[None, :]
        place = out + row * out_s + v[None, :]
        x = tl.load(place, mask, 0.0)
        y = tl.load(query + row * query_s + d[None, :], (row < rows) & (d < depth)[None, :], 0.0)
        more = tl.dot(y, from_query, tl.dot(x, from_output))
        tl.store(place, (x.to(tl.float32) + (more + added[None, :])).to(x.dtype), mask)


def correct_rows(
    out: Tensor, query: Tensor, constant: Tensor, by_output: Tensor, by_query: Tensor
) -> None:
    """Launch `correct_rows_kernel`; see `svg_attention.corrections.correct_rows`."""
    batch, heads, rows, width = out.shape
    depth = query.shape[3]
    if out.numel() == 0:
        return
    grid = (triton.cdiv(rows, BLOCK_ROWS * TILES), batch * heads)
    with on(out.device):
        correct_rows_kernel[grid](
            out, query, constant.contiguous(), by_output.contiguous(), by_query.contiguous(),
            rows, heads, width, depth,
            *out.stride()[:3], *query.stride()[:3],
            BLOCK_R=BLOCK_ROWS,
            BLOCK_V=max(16, triton.next_power_of_2(width)),
            BLOCK_D=max(16, triton.next_power_of_2(depth)),
            TILES=TILES,
            num_warps=4,
            num_stages=1,  # two blocks share a multiprocessor; 96 KB fit the smallest
        )  # fmt: skip
