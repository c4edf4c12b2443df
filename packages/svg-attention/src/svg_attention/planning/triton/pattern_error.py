"""Attending with a few query rows under three masks at once, the keys cut into spans."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_attention.planning.triton.launch import LOG2_E, Blocks, on, table_key

# (bytes of an element, head size) -> blocks of query rows and of keys, as `probes.MASS`.
BLOCKS = {
    (2, 64): Blocks(rows=64, columns=64, warps=8, stages=2),
    (2, 128): Blocks(rows=64, columns=64, warps=8, stages=2),
    (2, 256): Blocks(rows=32, columns=32, warps=8, stages=1),
    (4, 64): Blocks(rows=32, columns=32, warps=8, stages=2),
    (4, 128): Blocks(rows=32, columns=32, warps=8, stages=1),
    (4, 256): Blocks(rows=16, columns=16, warps=8, stages=1),
}
# Programs to start, so that a GPU of any size is filled about evenly.
PROGRAMS = 1024


@triton.jit
def pattern_error_kernel(
    rows,
    key,
    value,
    reads,
    outs,
    sums,
    tops,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    heads,
    group,
    count,
    length,
    span,
    spans,
    blocks,
    sequences,
    D,
    DV,
    scale_log2,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend with `BLOCK_R` rows of one head to one span of its keys."""
    part = tl.program_id(0) % spans
    block = tl.program_id(0) // spans % blocks
    sequence = (tl.program_id(0) // (spans * blocks)).to(tl.int64)
    batch = sequence // heads
    key_head = sequence % heads // group
    offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < count
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_DV)
    q = tl.load(
        rows + (sequence * count + offs_r)[:, None] * D + offs_d[None, :],
        mask=mask_r[:, None] & (offs_d < D)[None, :],
        other=0.0,
    )
    key += batch * k_batch + key_head * k_head
    value += batch * v_batch + key_head * v_head
    reads += (batch * count + offs_r)[:, None] * length
    top = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    sum0 = tl.zeros([BLOCK_R], dtype=tl.float32)
    sum1 = tl.zeros([BLOCK_R], dtype=tl.float32)
    sum2 = tl.zeros([BLOCK_R], dtype=tl.float32)
    acc0 = tl.zeros([BLOCK_R, BLOCK_DV], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_R, BLOCK_DV], dtype=tl.float32)
    acc2 = tl.zeros([BLOCK_R, BLOCK_DV], dtype=tl.float32)
    for n in range(part * span, tl.minimum(part * span + span, length), BLOCK_N):
        offs_n = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = offs_n < length
        k = tl.load(
            key + offs_n[:, None] * k_row + offs_d[None, :],
            mask=mask_n[:, None] & (offs_d < D)[None, :],
            other=0.0,
        )
        v = tl.load(
            value + offs_n[:, None] * v_row + offs_v[None, :],
            mask=mask_n[:, None] & (offs_v < DV)[None, :],
            other=0.0,
        )
        bits = tl.load(reads + offs_n[None, :], mask=mask_r[:, None] & mask_n[None, :], other=0).to(
            tl.int32
        )
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        logits = tl.where((bits & 1) != 0, logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        # Where no key was valid yet: -inf - -inf is not a number.
        shift = tl.where(new == float("-inf"), 0.0, new)
        fade = tl.exp2(top - shift)
        top = new
        p0 = tl.exp2(logits - shift[:, None])
        p1 = tl.where((bits & 2) != 0, p0, 0.0)
        p2 = tl.where((bits & 4) != 0, p0, 0.0)
        sum0 = sum0 * fade + tl.sum(p0, 1)
        sum1 = sum1 * fade + tl.sum(p1, 1)
        sum2 = sum2 * fade + tl.sum(p2, 1)
        acc0 = tl.dot(p0.to(v.dtype), v, acc0 * fade[:, None], input_precision=PRECISION)
        acc1 = tl.dot(p1.to(v.dtype), v, acc1 * fade[:, None], input_precision=PRECISION)
        acc2 = tl.dot(p2.to(v.dtype), v, acc2 * fade[:, None], input_precision=PRECISION)
    spot = (sequence * spans + part) * count + offs_r
    step = sequences * spans * count
    tl.store(tops + spot, top, mask=mask_r)
    tl.store(sums + spot, sum0, mask=mask_r)
    tl.store(sums + step + spot, sum1, mask=mask_r)
    tl.store(sums + 2 * step + spot, sum2, mask=mask_r)
    target = outs + spot[:, None] * DV + offs_v[None, :]
    inside = mask_r[:, None] & (offs_v < DV)[None, :]
    tl.store(target, acc0, mask=inside)
    tl.store(target + step * DV, acc1, mask=inside)
    tl.store(target + 2 * step * DV, acc2, mask=inside)


def pattern_error(rows: Tensor, key: Tensor, value: Tensor, reads: Tensor, scale: float) -> Tensor:
    """Launch `pattern_error_kernel` and put the spans together."""
    batch, heads, count, width = rows.shape
    length, depth = value.shape[2:]
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    wide = rows.dtype == torch.float32
    chosen = BLOCKS[table_key(rows if width >= depth else value)]
    block, step = chosen.rows, chosen.columns
    blocks = triton.cdiv(count, block)
    spans = max(1, min(PROGRAMS // max(batch * heads * blocks, 1), triton.cdiv(length, step)))
    span = triton.cdiv(triton.cdiv(length, spans), step) * step
    spans = triton.cdiv(length, span)
    sequences = batch * heads
    outs = rows.new_empty(3, sequences, spans, count, depth, dtype=torch.float32)
    sums = outs.new_empty(3, sequences, spans, count)
    tops = outs.new_empty(sequences, spans, count)
    with on(rows.device):
        pattern_error_kernel[(sequences * blocks * spans,)](
            rows.contiguous(), key, value, reads.contiguous(), outs, sums, tops,
            *key.stride()[:3], *value.stride()[:3], heads, heads // key.shape[1], count, length,
            span, spans, blocks, sequences, width, depth, scale * LOG2_E,
            BLOCK_R=block, BLOCK_N=step, BLOCK_D=max(16, triton.next_power_of_2(width)),
            BLOCK_DV=max(16, triton.next_power_of_2(depth)),
            PRECISION="ieee" if wide else "tf32", num_warps=chosen.warps,
            num_stages=chosen.stages,
        )  # fmt: skip
    fade = torch.exp2(tops - tops.amax(dim=1, keepdim=True))
    total = (sums * fade).sum(dim=2).clamp_min(torch.finfo(torch.float32).tiny)
    mixed = (outs * fade[..., None]).sum(dim=2) / total[..., None]
    return (mixed[1:] - mixed[0]).square().mean(dim=(-1, -2)).view(2, batch, heads)
