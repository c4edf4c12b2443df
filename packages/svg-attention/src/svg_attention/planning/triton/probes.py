"""Probing with Triton: gather and average queries, then score them against all key clusters.

The scores of a block of probes are computed twice, once for their softmax and once for the shares,
so that only the average of a tile's probes is ever written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_attention.planning.triton.launch import LOG2_E, Blocks, on, table_key
from svg_attention.tiles import TILE_ROWS

# (bytes of an element, head size padded to a power of two, at least 64) -> blocks of probes and of
# clusters. All fit the shared memory of compute capability 8.6; those for 16 bits and 128 channels
# were measured on an H200 in November 2026.
MASS = {
    (2, 64): Blocks(rows=64, columns=64),
    (2, 128): Blocks(rows=64, columns=128, stages=2),
    (2, 256): Blocks(rows=64, columns=32, stages=2),
    (4, 64): Blocks(rows=64, columns=32),
    (4, 128): Blocks(rows=64, columns=32, stages=2),
    (4, 256): Blocks(rows=32, columns=16, stages=2),
}


@triton.jit
def means_kernel(
    query,
    order,
    means,
    length,
    probes,
    blocks,
    heads,
    q_batch,
    q_head,
    q_row,
    D,
    PROBE_ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Average the rows of `BLOCK_P` probes of one head."""
    block = tl.program_id(0) % blocks
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    base = query + sequence // heads * q_batch + sequence % heads * q_head
    offs_p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    total = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    for first in range(0, PROBE_ROWS, UNROLL):
        for step in tl.static_range(UNROLL):
            row = offs_p * PROBE_ROWS + first + step
            inside = row < length
            token = tl.load(order + sequence * length + row, mask=inside, other=0).to(tl.int64)
            total += tl.load(
                base + token[:, None] * q_row + offs_d[None, :],
                mask=inside[:, None] & mask_d[None, :],
                other=0.0,
            ).to(tl.float32)
    count = tl.minimum(tl.maximum(length - offs_p * PROBE_ROWS, 1), PROBE_ROWS)
    total = total / count.to(tl.float32)[:, None]
    place = (sequence * probes + offs_p)[:, None] * D + offs_d[None, :]
    inside = (offs_p < probes)[:, None] & mask_d[None, :]
    tl.store(means + place, total.to(means.dtype.element_ty), mask=inside)


@triton.jit
def score(q, centroids, offs_c, offs_d, C, D, scale_log2, PRECISION: tl.constexpr):
    """Return the logits of probes for one key of each cluster, in units of log 2."""
    mask_c = offs_c < C
    keys = tl.load(
        centroids + offs_c[None, :] * D + offs_d[:, None],
        mask=mask_c[None, :] & (offs_d < D)[:, None],
        other=0.0,
    )
    return tl.dot(q, keys, input_precision=PRECISION) * scale_log2


@triton.jit
def mass_kernel(
    means,
    centroids,
    weights,
    mass,
    length,
    probes,
    blocks,
    group,
    C,
    D,
    scale_log2,
    PROBE_ROWS: tl.constexpr,
    PROBES: tl.constexpr,
    PER_KEY: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute how the attention of the tiles of one block of probes is shared."""
    block = tl.program_id(0) % blocks
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    offs_p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    q = tl.load(
        means + (sequence * probes + offs_p)[:, None] * D + offs_d[None, :],
        mask=(offs_p < probes)[:, None] & (offs_d < D)[None, :],
        other=0.0,
    )
    centroids += sequence // group * C * D
    weights += sequence // group * C
    maximum = tl.full([BLOCK_P], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_P], dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        weight = tl.load(weights + offs_c, mask=offs_c < C, other=float("-inf"))
        logits = score(q, centroids, offs_c, offs_d, C, D, scale_log2, PRECISION)
        logits += weight[None, :]
        new = tl.maximum(maximum, tl.max(logits, 1))
        # Before the first cluster with keys: -inf - -inf is not a number.
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(maximum - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        maximum = new
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    rows = tl.minimum(tl.maximum(length - offs_p * PROBE_ROWS, 0), PROBE_ROWS)
    tile_rows = tl.minimum(tl.maximum(length - offs_p // PROBES * 128, 1), 128)
    part = rows.to(tl.float32) / tile_rows.to(tl.float32) / tl.maximum(total, 1e-30)
    # A factor of every share; that of a probe without rows is as good as none.
    shift -= tl.log2(tl.maximum(part, 1e-30))
    TILES: tl.constexpr = BLOCK_P // PROBES
    tile = block * TILES + tl.arange(0, TILES)
    first_probe = (tl.arange(0, PROBES) == 0)[None, :, None]
    mass += sequence * (probes // PROBES) * C
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        weight = tl.load(weights + offs_c, mask=offs_c < C, other=float("-inf"))
        if PER_KEY:
            weight = tl.where(weight == float("-inf"), weight, 0.0)
        logits = score(q, centroids, offs_c, offs_d, C, D, scale_log2, PRECISION)
        share = tl.exp2(logits + weight[None, :] - shift[:, None])
        share = tl.reshape(share, [TILES, PROBES, BLOCK_C])
        total_share = tl.sum(share, 1, keep_dims=True)
        # The sum is stored from the place of a tile's first probe: stored as a tensor of its own,
        # every lane that holds a copy of it would write it to the same place in shared memory.
        share = tl.where(first_probe, total_share, share)
        inside = (tile < probes // PROBES)[:, None, None] & (offs_c < C)[None, None, :]
        target = mass + tile[:, None, None] * C + offs_c[None, None, :]
        target = tl.broadcast_to(target, [TILES, PROBES, BLOCK_C])
        tl.store(target, share, mask=inside & first_probe)


def probe_means(query: Tensor, order: Tensor, probe_rows: int) -> Tensor:
    """Launch `means_kernel`."""
    batch, heads, _, width = query.shape
    query = query if query.stride(3) == 1 else query.contiguous()
    length = order.shape[2]
    probes = (length + TILE_ROWS - 1) // TILE_ROWS * (TILE_ROWS // probe_rows)
    means = query.new_empty(batch, heads, probes, width)
    block = 16
    blocks = triton.cdiv(probes, block)
    if means.numel():
        with on(query.device):
            means_kernel[(batch * heads * blocks,)](
                query,
                order.contiguous(),
                means,
                length,
                probes,
                blocks,
                heads,
                *query.stride()[:3],
                width,
                PROBE_ROWS=probe_rows,
                UNROLL=min(probe_rows, 16),
                BLOCK_P=block,
                BLOCK_D=triton.next_power_of_2(width),
                num_warps=4,
            )
    return means


def probe_mass(
    means: Tensor,
    centroids: Tensor,
    sizes: Tensor,
    length: int,
    probe_rows: int,
    scale: float,
    per_key: bool,
) -> Tensor:
    """Launch `mass_kernel`."""
    batch, heads, probes, width = means.shape
    key_heads, count = centroids.shape[1:3]
    tiles = probes * probe_rows // TILE_ROWS
    mass = means.new_empty(batch, heads, tiles, count, dtype=torch.float32)
    if mass.numel():
        chosen = MASS[table_key(means)]
        block = max(chosen.rows, TILE_ROWS // probe_rows)
        blocks = triton.cdiv(probes, block)
        with on(means.device):
            mass_kernel[(batch * heads * blocks,)](
                means.contiguous(),
                centroids.to(means.dtype).contiguous(),
                # Minus infinity for an empty cluster.
                sizes.log2().contiguous(),
                mass,
                length,
                probes,
                blocks,
                heads // key_heads,
                count,
                width,
                scale * LOG2_E,
                PROBE_ROWS=probe_rows,
                PROBES=TILE_ROWS // probe_rows,
                PER_KEY=per_key,
                BLOCK_P=block,
                BLOCK_C=chosen.columns,
                BLOCK_D=max(16, triton.next_power_of_2(width)),
                PRECISION="ieee" if means.dtype == torch.float32 else "tf32",
                num_warps=chosen.warps,
                num_stages=chosen.stages,
            )
    return mass
