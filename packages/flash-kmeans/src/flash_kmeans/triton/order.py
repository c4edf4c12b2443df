"""A stable counting sort of points by label, without atomics.

Points are cut into chunks of `CHUNK`. Each chunk sorts its own labels and counts them; a scan down
the chunks turns counts into offsets, and its last program scans the sizes; then every point knows
its place and is written there. Three launches: at small sizes their number is what a round costs.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Compiling a sort takes ten seconds: once, not once for each kind of size.
@triton.jit(do_not_specialize=["N", "K", "chunks"])
def sort_chunks_kernel(
    labels, keys, ranks, counts, N, K, chunks, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Sort one chunk; write keys `label * CHUNK + place`, ranks inside a run, and counts."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    place = tl.arange(0, CHUNK)
    point = (program % chunks) * CHUNK + place
    label = tl.load(labels + b * N + point, mask=point < N, other=K)
    row = counts + program * K
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        tl.store(row + offs_k, tl.zeros([BLOCK_K], tl.int32), mask=offs_k < K)
    key = tl.sort(label * CHUNK + place)
    tl.store(keys + program * CHUNK + place, key)
    tl.debug_barrier()
    label = key // CHUNK
    before = tl.load(keys + program * CHUNK + place - 1, mask=place > 0, other=-1)
    after = tl.load(keys + program * CHUNK + place + 1, mask=place < CHUNK - 1, other=-1)
    head = (place == 0) | (before // CHUNK != label)
    tail = (place == CHUNK - 1) | (after // CHUNK != label)
    # A run's first place travels through the counter that its last point then overwrites.
    tl.store(row + label, place, mask=head & (label < K))
    tl.debug_barrier()
    rank = place - tl.load(row + label, mask=label < K, other=0)
    tl.debug_barrier()
    tl.store(ranks + program * CHUNK + place, rank.to(tl.int16))
    tl.store(row + label, rank + 1, mask=tail & (label < K))


@triton.jit
def _scan_sizes(sizes, starts, K, BLOCK_K: tl.constexpr):
    """Write the first sorted position of each cluster of one batch, and their end."""
    tl.store(starts, 0)
    carry = 0
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        # Past L1: other programs wrote these sizes.
        size = tl.load(sizes + offs_k, mask=offs_k < K, other=0, cache_modifier=".cg")
        tl.store(starts + offs_k + 1, tl.cumsum(size, 0) + carry, mask=offs_k < K)
        carry += tl.sum(size, 0)


@triton.jit
def scan_chunks_kernel(
    counts,
    sizes,
    starts,
    arrived,
    K,
    chunks,
    k_blocks,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Replace counts by the points of the same label in earlier chunks; write sizes and starts.

    `starts[b, k]` is the first sorted position of cluster k, and `starts[b, K]` is N. The program
    of a batch that arrives last writes them; `arrived` `[B]` is zero before and after.
    """
    program = tl.program_id(0)
    b = (program // k_blocks).to(tl.int64)
    offs_k = (program % k_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    carry = tl.zeros([BLOCK_K], tl.int32)
    for c in range(0, chunks, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask = (offs_c < chunks)[:, None] & (offs_k < K)[None, :]
        cell = counts + (b * chunks + offs_c)[:, None] * K + offs_k[None, :]
        here = tl.load(cell, mask=mask, other=0)
        tl.store(cell, tl.cumsum(here, 0) - here + carry[None, :], mask=mask)
        carry += tl.sum(here, 0)
    tl.store(sizes + b * K + offs_k, carry, mask=offs_k < K)
    # All warps have stored before one of them signals; the signal is a release and an acquire.
    tl.debug_barrier()
    if tl.atomic_add(arrived + b, 1) == k_blocks - 1:
        tl.store(arrived + b, 0)
        _scan_sizes(sizes + b * K, starts + b * (K + 1), K, WIDE)


@triton.jit
def starts_kernel(sizes, starts, K, BLOCK_K: tl.constexpr):
    """Write what `scan_chunks_kernel` writes into `starts`, where sizes are there already."""
    b = tl.program_id(0).to(tl.int64)
    _scan_sizes(sizes + b * K, starts + b * (K + 1), K, BLOCK_K)


@triton.jit
def place_kernel(keys, ranks, counts, starts, order, N, K, chunks, CHUNK: tl.constexpr):
    """Write each point's index to its place in the order."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    place = tl.arange(0, CHUNK)
    key = tl.load(keys + program * CHUNK + place)
    rank = tl.load(ranks + program * CHUNK + place).to(tl.int32)
    label = key // CHUNK
    mask = label < K
    start = tl.load(starts + b * (K + 1) + label, mask=mask, other=0)
    earlier = tl.load(counts + program * K + label, mask=mask, other=0)
    point = (program % chunks).to(tl.int32) * CHUNK + key % CHUNK
    tl.store(order + b * N + start + earlier + rank, point, mask=mask)
