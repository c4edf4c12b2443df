"""The portable kernel: any GPU from compute capability 8.0 on, any head size up to 256.

A tile's runs are read as one flat loop over chunks of `BLOCK_N` key rows, so that Triton can fetch
the chunks ahead. A chunk holds the rest of one run and, where that leaves room, the beginning of
the next; what it holds is worked out from the run list as the loop goes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_kernels.attention.operands import TILE_ROWS, Operands

COUNT_TILES = 32  # tiles that one program of `count_chunks_kernel` looks after


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Launch parameters: query rows and key rows of a step, warps, and chunks in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


# (compute capability, bytes of an element, head size padded to a power of two) -> blocks.
# Rows for 9.0 in 16 bits were measured on an H200 in November 2026; the others fit the shared
# memory of their device and are untuned.
BLOCKS: dict[tuple[int, int, int], Blocks] = {
    (80, 2, 64): Blocks(rows=128, keys=64, warps=4, stages=3),
    (80, 2, 128): Blocks(rows=128, keys=64, warps=8, stages=3),
    (80, 2, 256): Blocks(rows=64, keys=32, warps=4, stages=2),
    (80, 4, 64): Blocks(rows=64, keys=32, warps=4, stages=2),
    (80, 4, 128): Blocks(rows=64, keys=32, warps=4, stages=2),
    (80, 4, 256): Blocks(rows=32, keys=16, warps=4, stages=2),
    (86, 2, 64): Blocks(rows=128, keys=64, warps=4, stages=2),
    (86, 2, 128): Blocks(rows=128, keys=32, warps=8, stages=2),
    (86, 2, 256): Blocks(rows=64, keys=32, warps=4, stages=1),
    (86, 4, 64): Blocks(rows=64, keys=32, warps=4, stages=2),
    (86, 4, 128): Blocks(rows=32, keys=32, warps=4, stages=2),
    (86, 4, 256): Blocks(rows=32, keys=16, warps=4, stages=1),
    (90, 2, 64): Blocks(rows=128, keys=128, warps=8, stages=3),
    (90, 2, 128): Blocks(rows=128, keys=64, warps=8, stages=3),
    (90, 2, 256): Blocks(rows=128, keys=32, warps=8, stages=2),
}
# Devices with the shared memory of an older one take its rows; a device that is not named takes
# those of the last one before it.
SAME_AS = {80: 80, 86: 86, 87: 80, 89: 86, 90: 90, 100: 90, 120: 86}


def blocks_for(capability: int, element_size: int, head_dim: int) -> Blocks:
    """Return the row of the table for a device of `capability` (90 for 9.0) and a head size."""
    known = SAME_AS[max(c for c in SAME_AS if c <= max(capability, 80))]
    width = max(64, triton.next_power_of_2(head_dim))
    # fp32 has no row of its own for 9.0: what fits 8.0 fits there.
    return BLOCKS.get((known, element_size, width)) or BLOCKS[80, element_size, width]


@triton.jit
def count_chunks_kernel(
    run_lengths, counts, tiles, runs, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Count the chunks of `BLOCK_T` tiles, packing runs as `block_sparse_attention_kernel` does."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < tiles
    chunks = tl.zeros([BLOCK_T], dtype=tl.int32)
    room = tl.zeros([BLOCK_T], dtype=tl.int32)
    for r in range(runs):
        length = tl.load(run_lengths + offs_t * runs + r, mask=mask_t, other=0)
        rest = tl.maximum(length - room, 0)
        own = (rest + BLOCK_N - 1) // BLOCK_N
        chunks += own
        room = own * BLOCK_N - rest
    tl.store(counts + offs_t, chunks, mask=mask_t)


@triton.jit
def absorb(
    q, k, v, bias, qk_scale, maximum, total, acc, PRECISION: tl.constexpr, LEFT_OUT: tl.constexpr
):
    """Add one chunk of keys to the running softmax; logits are in units of log 2.

    With LEFT_OUT, keys of bias minus infinity take no part even where their logit is not a number.
    """
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale + bias[None, :]
    if LEFT_OUT:
        logits = tl.where(bias[None, :] == float("-inf"), float("-inf"), logits)
    new = tl.maximum(maximum, tl.max(logits, 1))
    # A row that has met no key yet: -inf - -inf is not a number.
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(logits - shift[:, None])
    correction = tl.exp2(maximum - shift)
    total = total * correction + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
    return new, total, acc


@triton.jit
def block_sparse_attention_kernel(
    query,
    key,
    value,
    out,
    lse,
    query_order,
    run_starts,
    run_lengths,
    chunk_counts,
    tile_order,
    summary_keys,
    summary_values,
    summary_weights,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    o_batch,
    o_head,
    o_row,
    heads,
    group,
    tiles,
    query_length,
    runs,
    summaries,
    qk_scale,
    HAS_ORDER: tl.constexpr,
    HAS_TILE_ORDER: tl.constexpr,
    HAS_SUMMARY: tl.constexpr,
    HAS_LSE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute `BLOCK_M` rows of one tile."""
    PARTS: tl.constexpr = 128 // BLOCK_M
    tile = (tl.program_id(0) // PARTS).to(tl.int64)
    if HAS_TILE_ORDER:
        tile = tl.load(tile_order + tile).to(tl.int64)
    sequence = tile // tiles
    batch = sequence // heads
    head = sequence % heads
    key_head = head // group
    key_sequence = batch * (heads // group) + key_head

    position = (tile % tiles) * 128 + (tl.program_id(0) % PARTS) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = position < query_length
    token = position
    if HAS_ORDER:
        token = tl.load(query_order + sequence * query_length + position, mask=mask_m, other=0)
        token = token.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    mask_d = offs_d < D
    q_rows = query + batch * q_batch + head * q_head + token[:, None] * q_row + offs_d[None, :]
    q = tl.load(q_rows, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
    keys = key + batch * k_batch + key_head * k_head + offs_d[None, :]
    values = value + batch * v_batch + key_head * v_head + offs_d[None, :]

    maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    # The current run from `row` on has `left` rows; the two that follow it wait in registers.
    starts = run_starts + tile * runs
    lengths = run_lengths + tile * runs
    row = tl.load(starts)
    left = tl.load(lengths)
    following = 1
    start1 = tl.load(starts + 1, mask=runs > 1, other=0)
    length1 = tl.load(lengths + 1, mask=runs > 1, other=0)
    start2 = tl.load(starts + 2, mask=runs > 2, other=0)
    length2 = tl.load(lengths + 2, mask=runs > 2, other=0)
    for _ in tl.range(0, tl.load(chunk_counts + tile), num_stages=STAGES):
        first = tl.minimum(left, BLOCK_N)
        second = tl.minimum(length1, BLOCK_N - first)
        rows = tl.where(offs_n < first, row + offs_n, start1 + (offs_n - first))
        # Rows past the chunk's end read its first row and weigh nothing: a row that the tile reads,
        # so that NaN elsewhere stays out.
        rows = tl.where(offs_n < first + second, rows, tl.where(first > 0, row, start1))
        rows = rows.to(tl.int64)
        bias = tl.where(offs_n < first + second, 0.0, float("-inf"))
        if D == BLOCK_D:
            k = tl.load(keys + rows[:, None] * k_row)
            v = tl.load(values + rows[:, None] * v_row)
        else:
            k = tl.load(keys + rows[:, None] * k_row, mask=mask_d[None, :], other=0.0)
            v = tl.load(values + rows[:, None] * v_row, mask=mask_d[None, :], other=0.0)
        maximum, total, acc = absorb(q, k, v, bias, qk_scale, maximum, total, acc, PRECISION, False)
        used_up = left <= BLOCK_N
        both = used_up & (second == length1)
        row = tl.where(used_up, tl.where(both, start2, start1 + second), row + BLOCK_N)
        left = tl.where(used_up, tl.where(both, length2, length1 - second), left - BLOCK_N)
        following += used_up.to(tl.int32) + both.to(tl.int32)
        start1 = tl.load(starts + following, mask=following < runs, other=0)
        length1 = tl.load(lengths + following, mask=following < runs, other=0)
        start2 = tl.load(starts + following + 1, mask=following + 1 < runs, other=0)
        length2 = tl.load(lengths + following + 1, mask=following + 1 < runs, other=0)

    if HAS_SUMMARY:
        summary_keys += key_sequence * summaries * D + offs_d[None, :]
        summary_values += key_sequence * summaries * D + offs_d[None, :]
        weights = summary_weights + tile * summaries
        for c in tl.range(0, summaries, BLOCK_N, num_stages=1):
            offs_c = c + offs_n
            bias = tl.load(weights + offs_c, mask=offs_c < summaries, other=float("-inf"))
            bias *= 1.4426950408889634
            # What is left out is not read either: NaN times a weight of 0 is NaN.
            mask_cd = (bias > float("-inf"))[:, None] & mask_d[None, :]
            k = tl.load(summary_keys + offs_c[:, None] * D, mask=mask_cd, other=0.0)
            v = tl.load(summary_values + offs_c[:, None] * D, mask=mask_cd, other=0.0)
            maximum, total, acc = absorb(
                q, k, v, bias, qk_scale, maximum, total, acc, PRECISION, True
            )

    nonzero = tl.where(total == 0, 1.0, total)  # NaN stays NaN
    acc = acc / nonzero[:, None]
    o_rows = out + batch * o_batch + head * o_head + token[:, None] * o_row + offs_d[None, :]
    tl.store(o_rows, acc.to(out.dtype.element_ty), mask=mask_m[:, None] & mask_d[None, :])
    if HAS_LSE:
        logsum = (maximum + tl.log2(nonzero)) * 0.6931471805599453
        tl.store(lse + sequence * query_length + token, logsum, mask=mask_m)


def block_sparse_attention(operands: Operands, out: Tensor, lse: Tensor | None) -> None:
    """Launch both kernels on the current stream; see `svg_kernels.block_sparse_attention`."""
    query, key, value, run_starts, run_lengths, *others, scale = operands
    _, heads, length, width = query.shape
    runs = run_starts.shape[-1]
    if runs == 0:
        run_starts = run_lengths = run_starts.new_zeros((*run_starts.shape[:-1], 1))
        runs = 1
    blocks = blocks_for(_capability(query.device), query.element_size(), width)
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    run_starts, run_lengths = run_starts.contiguous(), run_lengths.contiguous()
    query_order, summary_keys, summary_values, summary_weights, tile_order = (
        None if x is None else x.contiguous() for x in others
    )
    total = run_starts.numel() // runs
    counts = torch.empty(total, dtype=torch.int32, device=query.device)
    with _on(query.device):
        count_chunks_kernel[(triton.cdiv(total, COUNT_TILES),)](
            run_lengths, counts, total, runs, BLOCK_N=blocks.keys, BLOCK_T=COUNT_TILES, num_warps=1
        )
        block_sparse_attention_kernel[(total * (TILE_ROWS // blocks.rows),)](
            query,
            key,
            value,
            out,
            lse,
            query_order,
            run_starts,
            run_lengths,
            counts,
            tile_order,
            summary_keys,
            summary_values,
            summary_weights,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *out.stride()[:3],
            heads,
            heads // key.shape[1],
            run_starts.shape[2],
            length,
            runs,
            0 if summary_keys is None else summary_keys.shape[2],
            scale * 1.4426950408889634,
            HAS_ORDER=query_order is not None,
            HAS_TILE_ORDER=tile_order is not None,
            HAS_SUMMARY=summary_keys is not None,
            HAS_LSE=lse is not None,
            D=width,
            BLOCK_D=max(16, triton.next_power_of_2(width)),
            BLOCK_M=blocks.rows,
            BLOCK_N=blocks.keys,
            STAGES=blocks.stages,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=blocks.warps,
        )


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _on(device: torch.device) -> torch.cuda.device:
    return torch.cuda.device(device if device.type == "cuda" else -1)
