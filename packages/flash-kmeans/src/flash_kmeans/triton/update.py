"""Sums of points per cluster, read in sorted order, and centroids from them. No atomics.

Sums are accumulated in `SUM`: fp32 for 16-bit points, fp64 for fp32 ones.

A program sums `SPAN` consecutive sorted positions, run by run. A cluster that lies inside one span
is summed at once; the pieces of others (at most a first and a last one per span) are kept apart
and added in order when centroids are finished, so results do not depend on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .assign import scored


@triton.jit
def segment_sums_kernel(
    x,
    order,
    labels,
    starts,
    scale,
    weight,
    previous,
    sums,
    totals,
    piece_sums,
    piece_totals,
    costs,
    N,
    K,
    spans,
    stride_xb,
    stride_xn,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUM: tl.constexpr,
    SCALED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WITH_COST: tl.constexpr,
):
    """Sum one span of sorted points, cluster by cluster, and their squared distances."""
    program = tl.program_id(0).to(tl.int64)
    b = program // spans
    begin = (program % spans).to(tl.int32) * SPAN
    end = tl.minimum(begin + SPAN, N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    x += b * stride_xb
    order += b * N
    labels += b * N
    starts += b * (K + 1)
    if SCALED:
        scale += b * N
    if WEIGHTED:
        weight += b * N
    cost = tl.zeros([BLOCK_D], tl.float32)
    position = begin
    k = tl.load(labels + tl.load(order + begin))
    while position < end:
        k_begin = tl.load(starts + k)
        k_end = tl.load(starts + k + 1)
        stop = tl.minimum(k_end, end)
        if WITH_COST:
            mean = tl.load(previous + (b * K + k) * D + offs_d, mask=mask_d, other=0.0)
            mean = mean.to(tl.float32)
        total = tl.zeros([BLOCK_D], SUM)
        mass = tl.zeros([], SUM)
        for i in range(position, stop, BLOCK_N):
            rows = i + tl.arange(0, BLOCK_N)
            mask_n = rows < stop
            point = tl.load(order + rows, mask=mask_n, other=0)
            address = x + point.to(tl.int64)[:, None] * stride_xn + offs_d[None, :]
            values = tl.load(address, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
            values = values.to(tl.float32)
            if SCALED:
                values *= tl.load(scale + point, mask=mask_n, other=0.0)[:, None]
            if WITH_COST:
                apart = tl.where(mask_n[:, None], values - mean[None, :], 0.0)
                square = apart * apart
            if WEIGHTED:
                w = tl.load(weight + point, mask=mask_n, other=0.0)
                if WITH_COST:
                    square *= w[:, None]
                values = values.to(SUM) * w.to(SUM)[:, None]
                mass += tl.sum(w.to(SUM), 0)
            total += tl.sum(values.to(SUM), 0)
            if WITH_COST:
                cost += tl.sum(square, 0)
        if (k_begin >= begin) & (k_end <= end):
            tl.store(sums + (b * K + k) * D + offs_d, total, mask=mask_d)
            if WEIGHTED:
                tl.store(totals + b * K + k, mass)
        else:
            piece = program * 2 + tl.where(position == begin, 0, 1)
            tl.store(piece_sums + piece * D + offs_d, total, mask=mask_d)
            if WEIGHTED:
                tl.store(piece_totals + piece, mass)
        position = stop
        k += 1
        # The next cluster is known without a look at its points, unless it is empty.
        if (position < end) & (tl.load(starts + tl.minimum(k + 1, K)) == position):
            k = tl.load(labels + tl.load(order + position))
    if WITH_COST:
        tl.store(costs + program * tl.num_programs(1) + tl.program_id(1), tl.sum(cost, 0))


@triton.jit
def _unit(row):
    """Scale one row to unit length; a zero row stays."""
    square = tl.sum(row * row, 0)
    return row / tl.where(square > 0, tl.sqrt(square), 1.0)


@triton.jit
def finish_kernel(
    starts,
    centroids,
    sums,
    totals,
    piece_sums,
    piece_totals,
    raw_sums,
    raw_totals,
    costs,
    directions,
    bias,
    direction_scale,
    K,
    spans,
    rows,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUM: tl.constexpr,
    METRIC: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WITH_COST: tl.constexpr,
    RAW: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add the pieces of one cluster and move its centroid to the mean (or return the sum raw).

    With a WIDTH it also writes what the next assignment compares with, as `prepare_kernel` does,
    into row k of `rows` a batch.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // K
    k = program % K
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    begin = tl.load(starts + b * (K + 1) + k)
    end = tl.load(starts + b * (K + 1) + k + 1)
    size = end - begin
    first = begin // SPAN
    last = (end - 1) // SPAN
    whole = (size > 0) & (first == last)
    total = tl.load(sums + program * D + offs_d, mask=mask_d & whole, other=0.0)
    mass = size.to(SUM)
    if WEIGHTED:
        mass = tl.load(totals + program, mask=whole, other=0.0)
    if (size > 0) & (first < last):
        for p in range(first, last + 1, BLOCK_P):
            offs_p = p + tl.arange(0, BLOCK_P)
            mask_p = offs_p <= last
            slot = tl.where((offs_p == first) & (begin > first * SPAN), 1, 0)
            piece = (b * spans + offs_p) * 2 + slot
            mask = mask_p[:, None] & mask_d[None, :]
            total += tl.sum(
                tl.load(piece_sums + piece[:, None] * D + offs_d[None, :], mask, 0.0), 0
            )
            if WEIGHTED:
                mass += tl.sum(tl.load(piece_totals + piece, mask=mask_p, other=0.0), 0)
    if RAW:
        tl.store(raw_sums + program * D + offs_d, total, mask=mask_d)
        tl.store(raw_totals + program, mass)
    else:
        old = tl.load(centroids + program * D + offs_d, mask=mask_d, other=0.0)
        if METRIC == "cosine":
            norm = tl.sqrt(tl.sum(total * total, 0))
            alive = norm > 0
            new = total / tl.where(alive, norm, 1.0)
        else:
            alive = mass > 0
            new = total / tl.where(alive, mass, 1.0)
        # A sum that is not finite leaves the centroid where it was.
        alive = alive & (tl.sum((tl.abs(new) < float("inf")).to(tl.int32), 0) == BLOCK_D)
        stored = tl.where(alive, new.to(old.dtype), old)
        tl.store(centroids + program * D + offs_d, stored, mask=mask_d)
        if WIDTH:
            wide = stored.to(tl.float32)
            square = tl.sum(wide * wide, 0)
            comparable, shift, inverse = scored(square, METRIC)
            row = b * rows + k
            direction = tl.where(comparable, stored, tl.zeros_like(stored))
            tl.store(directions + row * WIDTH + offs_d, direction, mask=mask_d)
            tl.store(bias + row, shift)
            if METRIC == "cosine":
                tl.store(direction_scale + row, inverse)
        if WITH_COST:
            c = stored.to(SUM)
            if METRIC == "dot":
                change = -tl.sum(total * c, 0)
            else:
                # sum w |x - c|^2 = sum w |x - old|^2 + (c - old) . (mass (c + old) - 2 sum w x)
                before = old.to(SUM)
                if METRIC == "cosine":
                    c = _unit(c)
                    before = _unit(before)
                step = c - before
                change = tl.sum(step * (mass * step - 2 * (total - mass * before)), 0)
            tl.store(costs + program, change)
