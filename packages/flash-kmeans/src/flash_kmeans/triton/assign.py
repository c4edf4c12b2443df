"""Nearest-centroid labels: a matrix product whose rows are reduced before they leave registers.

A program keeps one tile of points and streams all centroids past it. The product of a tile gives
`BLOCK_N x BLOCK_K` scores; the running best of a row is kept once per lane of the tensor core's
row layout (four lanes share a row, each holding pairs of neighbouring columns), so nothing crosses
lanes inside the loop, and a column's number is a constant of the instruction that selects it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _larger(a_score, a_index, b_score, b_index):
    take = b_score > a_score
    return tl.where(take, b_score, a_score), tl.where(take, b_index, a_index)


@triton.jit
def _larger_or_first(a_score, a_index, b_score, b_index):
    take = (b_score > a_score) | ((b_score == a_score) & (b_index < a_index))
    return tl.where(take, b_score, a_score), tl.where(take, b_index, a_index)


@triton.jit
def _fold(scores, best, where, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Fold one tile of scores into the running best of each row and lane."""
    groups: tl.constexpr = BLOCK_K // 8
    split = tl.reshape(scores, [BLOCK_N, groups, 4, 2])
    place = tl.arange(0, groups)[None, :, None, None] * 2 + tl.arange(0, 2)[None, None, None, :]
    place = place + tl.zeros([BLOCK_N, groups, 4, 2], tl.int32)
    score, index = tl.reduce((split, place), 3, _larger)
    score, index = tl.reduce((score, index), 1, _larger)
    take = score > best
    best = tl.where(take, score, best)
    where = tl.where(take, index + k * (BLOCK_K // 4), where)
    return best, where


@triton.jit
def _column(where, BLOCK_K: tl.constexpr):
    """Turn (lane, running index) back into the number of a centroid."""
    tile = where // (BLOCK_K // 4)
    place = where % (BLOCK_K // 4)
    lane = tl.arange(0, 4)[None, :]
    return tile * BLOCK_K + (place // 2) * 8 + lane * 2 + place % 2


@triton.jit
def assign_kernel(
    x,
    directions,
    scale,
    bias,
    origin,
    labels,
    N,
    k_tiles,
    n_tiles,
    stride_xb,
    stride_xn,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_TILES: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SCALED: tl.constexpr,
    CENTERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the label of each point of one tile: the highest `x.direction * scale + bias`.

    If CENTERED, points are first measured from `origin` `[B, D]`.
    """
    program = tl.program_id(0)
    b = program // n_tiles
    rows = (program % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (rows < N)[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    points = x + b.to(tl.int64) * stride_xb + rows.to(tl.int64)[:, None] * stride_xn
    first = b * (k_tiles * BLOCK_K)
    if not DESCRIBED:
        width: tl.constexpr = D_TILES * BLOCK_D
        directions += (first.to(tl.int64) + offs_k[None, :]) * width + offs_d[:, None]
        bias += first.to(tl.int64) + offs_k
    if SCALED:
        scale += first.to(tl.int64) + offs_k
    if CENTERED:
        origin += b.to(tl.int64) * D
    best = tl.full([BLOCK_N, 4], -float("inf"), tl.float32)
    where = tl.zeros([BLOCK_N, 4], tl.int32)
    if D_TILES == 1:
        tile = tl.load(points + offs_d[None, :], mask=mask_n & (offs_d < D)[None, :], other=0.0)
        if CENTERED:
            tile -= tl.load(origin + offs_d, mask=offs_d < D, other=0.0)[None, :]
        for k in tl.range(0, k_tiles, num_stages=STAGES):
            if DESCRIBED:
                centroids = directions.load([first + k * BLOCK_K, 0]).T
                shift = bias.load([first + k * BLOCK_K])
            else:
                centroids = tl.load(directions)
                shift = tl.load(bias)
                directions += BLOCK_K * BLOCK_D
                bias += BLOCK_K
            scores = tl.dot(tile, centroids, input_precision=PRECISION)
            if SCALED:
                scores = scores * tl.load(scale + k * BLOCK_K)[None, :]
            best, where = _fold(scores + shift[None, :], best, where, k, BLOCK_N, BLOCK_K)
    else:
        for k in tl.range(0, k_tiles, num_stages=1):
            scores = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for d in tl.range(0, D_TILES, num_stages=STAGES):
                mask_d = (d * BLOCK_D + offs_d < D)[None, :]
                tile = tl.load(
                    points + d * BLOCK_D + offs_d[None, :], mask=mask_n & mask_d, other=0.0
                )
                if CENTERED:
                    middle = origin + d * BLOCK_D + offs_d[None, :]
                    tile -= tl.load(middle, mask=mask_d, other=0.0)
                if DESCRIBED:
                    centroids = directions.load([first + k * BLOCK_K, d * BLOCK_D]).T
                else:
                    centroids = tl.load(directions + d * BLOCK_D)
                scores = tl.dot(tile, centroids, scores, input_precision=PRECISION)
            if DESCRIBED:
                shift = bias.load([first + k * BLOCK_K])
            else:
                shift = tl.load(bias)
                directions += BLOCK_K * (D_TILES * BLOCK_D)
                bias += BLOCK_K
            if SCALED:
                scores = scores * tl.load(scale + k * BLOCK_K)[None, :]
            best, where = _fold(scores + shift[None, :], best, where, k, BLOCK_N, BLOCK_K)
    _, label = tl.reduce((best, _column(where, BLOCK_K)), 1, _larger_or_first)
    tl.store(labels + b.to(tl.int64) * N + rows, label, mask=rows < N)


@triton.jit
def scored(square, METRIC: tl.constexpr):
    """Return whether centroids of this squared norm can be compared with, their biases and scales.

    One that is not finite, or whose square is not, cannot: the assign kernel compares without
    looking for NaN, so that one would hide the centroids it is compared with.
    """
    alive = square < float("inf")
    bias = -0.5 * square if METRIC == "euclidean" else tl.zeros_like(square)
    long = (square > 0) & alive
    scale = tl.where(long, 1 / tl.sqrt(tl.where(long, square, 1.0)), 0.0)
    return alive, tl.where(alive, bias, -float("inf")), scale


@triton.jit
def prepare_kernel(
    centroids,
    directions,
    scale,
    bias,
    K,
    k_blocks,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    METRIC: tl.constexpr,
):
    """Copy centroids into zero-padded rows and derive what the scores need of their norms."""
    program = tl.program_id(0)
    b = (program // k_blocks).to(tl.int64)
    offs_k = (program % k_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = b * (k_blocks * BLOCK_K) + offs_k
    source = centroids + (b * K + offs_k)[:, None] * D
    square = tl.zeros([BLOCK_K], tl.float32)
    for d in range(0, WIDTH, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask = (offs_k < K)[:, None] & (offs_d < D)[None, :]
        wide = tl.load(source + offs_d[None, :], mask, other=0.0).to(tl.float32)
        square += tl.sum(wide * wide, 1)
    alive, shift, inverse = scored(square, METRIC)
    for d in range(0, WIDTH, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask = (offs_k < K)[:, None] & (offs_d < D)[None, :] & alive[:, None]
        padded = directions + row[:, None] * WIDTH + offs_d[None, :]
        tl.store(padded, tl.load(source + offs_d[None, :], mask, 0.0), (offs_d < WIDTH)[None, :])
    tl.store(bias + row, tl.where(offs_k < K, shift, -float("inf")))
    if METRIC == "cosine":
        tl.store(scale + row, inverse)
