"""Scoring every key with every probe, cluster by cluster, without keeping a score.

Keys are first laid out cluster by cluster with the cluster's centroid behind its last key, and with
two numbers for each row: `energy`, what its squared weight counts, and `agreement`, what its weight
counts when multiplied with the centroid's. A block of probes then reads these rows in chunks that
belong to one cluster each, as attention does, with a running maximum. What it finds for a cluster
waits beside the maximum it was found under until the softmax's denominator is known; so do its mass
and what the logarithm of its centroid's weight lacks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from svg_attention.planning.dispatch import LARGEST_BIAS
from svg_attention.planning.triton.launch import LOG2_E, Blocks, on, table_key
from svg_attention.tiles import TILE_ROWS, match_heads

# (bytes of an element, head size) -> blocks of probes and of keys, as `probes.MASS`.
BLOCKS = {
    (2, 64): Blocks(rows=128, columns=64, warps=8),
    (2, 128): Blocks(rows=128, columns=64, warps=8),
    (2, 256): Blocks(rows=64, columns=32, stages=2),
    (4, 64): Blocks(rows=32, columns=32, stages=2),
    (4, 128): Blocks(rows=32, columns=32, stages=2),
    (4, 256): Blocks(rows=32, columns=16, stages=2),
}
# Clusters whose sums are put together at a time.
TOGETHER = 16
# Programs per multiprocessor; each has scratch of its own.
PROGRAMS = 2


@triton.jit
def lay_out_kernel(
    key,
    value,
    order,
    centroids,
    value_means,
    constants,
    starts,
    rows,
    energy,
    agreement,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    heads,
    length,
    C,
    D,
    DV,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Lay out one cluster: its keys, then its centroid, and what they count."""
    cluster = tl.program_id(0) % C
    sequence = (tl.program_id(0) // C).to(tl.int64)
    key += sequence // heads * k_batch + sequence % heads * k_head
    value += sequence // heads * v_batch + sequence % heads * v_head
    first = tl.load(starts + sequence * (C + 1) + cluster)
    count = tl.load(starts + sequence * (C + 1) + cluster + 1) - first
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_DV)
    mask_v = offs_v < DV
    constant = tl.load(constants + sequence * DV + offs_v, mask=mask_v, other=0.0)
    mean = tl.load(value_means + (sequence * C + cluster) * DV + offs_v, mask=mask_v, other=0.0).to(
        tl.float32
    )
    mean = tl.where(mask_v, mean - constant, 0.0)
    centroid = tl.load(
        centroids + (sequence * C + cluster) * D + offs_d, mask=offs_d < D, other=0.0
    )
    share = 1.0 / tl.maximum(count, 1).to(tl.float32)
    # Each cluster before this one has left a row for its centroid.
    target = sequence * (length + C) + first + cluster
    for n in range(0, count, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < count
        token = tl.load(order + sequence * length + first + offs_n, mask=mask_n, other=0)
        token = token.to(tl.int64)[:, None]
        mask_nd = mask_n[:, None] & (offs_d < D)[None, :]
        k = tl.load(key + token * k_row + offs_d[None, :], mask=mask_nd, other=0.0)
        tl.store(rows + (target + offs_n)[:, None] * D + offs_d[None, :], k, mask=mask_nd)
        mask_nv = mask_n[:, None] & mask_v[None, :]
        v = tl.load(value + token * v_row + offs_v[None, :], mask=mask_nv, other=0.0)
        v = tl.where(mask_nv, v.to(tl.float32) - constant[None, :], 0.0)
        tl.store(energy + target + offs_n, tl.sum(v * v, 1) * share, mask=mask_n)
        tl.store(agreement + target + offs_n, tl.sum(v * mean[None, :], 1) * share, mask=mask_n)
    tl.store(rows + (target + count) * D + offs_d, centroid, mask=offs_d < D)
    tl.store(energy + target + count, tl.where(count > 0, tl.sum(mean * mean, 0), 0.0))
    tl.store(agreement + target + count, 0.0)


@triton.jit
def probe_sums_kernel(
    means,
    rows,
    energy,
    agreement,
    starts,
    errors,
    biases,
    lse,
    scratch,
    length,
    keys,
    probes,
    blocks,
    group,
    total,
    C,
    D,
    scale_log2,
    largest_bias,
    PROBE_ROWS: tl.constexpr,
    PROBES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOGETHER: tl.constexpr,
    ALL_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Score all clusters for blocks of probes, one block after another."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_P)
    all_c = tl.arange(0, ALL_C)
    TILES: tl.constexpr = BLOCK_P // PROBES
    found = scratch + tl.program_id(0).to(tl.int64) * 4 * C * BLOCK_P
    under = found + C * BLOCK_P
    masses = under + C * BLOCK_P
    gaps = masses + C * BLOCK_P
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        block = item % blocks
        sequence = (item // blocks).to(tl.int64)
        offs_p = block * BLOCK_P + lane
        q = tl.load(
            means + (sequence * probes + offs_p)[:, None] * D + offs_d[None, :],
            mask=(offs_p < probes)[:, None] & (offs_d < D)[None, :],
            other=0.0,
        )
        edges = starts + sequence // group * (C + 1)
        base = sequence // group * (keys + C)
        # Chunks of every cluster, its centroid's row counted in.
        sizes = tl.load(edges + all_c + 1, mask=all_c < C, other=0)
        sizes -= tl.load(edges + all_c, mask=all_c < C, other=0)
        chunks = tl.sum(tl.where(all_c < C, (sizes + BLOCK_N) // BLOCK_N, 0), 0)
        maximum = tl.full([BLOCK_P], float("-inf"), dtype=tl.float32)
        denominator = tl.zeros([BLOCK_P], dtype=tl.float32)
        square = tl.zeros([BLOCK_P], dtype=tl.float32)
        cross = tl.zeros([BLOCK_P], dtype=tl.float32)
        mass = tl.zeros([BLOCK_P], dtype=tl.float32)
        cluster = 0
        row = 0
        count = tl.load(edges + 1)
        left = count + 1
        for _ in tl.range(0, chunks):
            inside = offs_n < left
            place = base + row + offs_n
            k = tl.load(
                rows + place[:, None] * D + offs_d[None, :],
                mask=inside[:, None] & (offs_d < D)[None, :],
                other=0.0,
            )
            weight_square = tl.load(energy + place, mask=inside, other=0.0)
            weight_cross = tl.load(agreement + place, mask=inside, other=0.0)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
            logits = tl.where(inside[None, :], logits, float("-inf"))
            new = tl.maximum(maximum, tl.max(logits, 1))
            fade = tl.exp2(maximum - new)
            maximum = new
            weights = tl.exp2(logits - new[:, None])
            last = left <= BLOCK_N
            is_centre = last & (offs_n == left - 1)
            centre = tl.sum(tl.where(is_centre[None, :], weights, 0.0), 1)
            added = tl.sum(weights, 1) - centre
            denominator = denominator * fade + added
            mass = mass * fade + added
            cross = cross * fade + tl.sum(weights * weight_cross[None, :], 1)
            square = square * fade * fade
            square += tl.sum(weights * weights * weight_square[None, :], 1)
            result = tl.maximum(square - 2.0 * centre * cross, 0.0)
            write = last & (lane >= 0)
            tl.store(found + cluster * BLOCK_P + lane, result, mask=write)
            tl.store(under + cluster * BLOCK_P + lane, maximum, mask=write)
            # The centroid's own logit, which its weight may be too small to tell.
            centre_logit = tl.sum(tl.where(is_centre[None, :], logits, 0.0), 1)
            mean_mass = tl.maximum(mass, 1e-37) / tl.maximum(count, 1).to(tl.float32)
            gap = (tl.log2(mean_mass) + maximum - centre_logit) * 0.6931471805599453
            gap = tl.minimum(tl.maximum(gap, 0.0), largest_bias)
            tl.store(masses + cluster * BLOCK_P + lane, tl.maximum(mass, 0.0), mask=write)
            tl.store(gaps + cluster * BLOCK_P + lane, gap, mask=write)
            row += tl.minimum(left, BLOCK_N)
            cluster += last.to(tl.int32)
            square = tl.where(last, 0.0, square)
            cross = tl.where(last, 0.0, cross)
            mass = tl.where(last, 0.0, mass)
            inner = cluster < C
            following = tl.load(edges + cluster + 1, mask=inner, other=0)
            following -= tl.load(edges + cluster, mask=inner, other=0)
            left = tl.where(last, following + 1, left - BLOCK_N)
            count = tl.where(last, following, count)
        tl.debug_barrier()
        share = tl.minimum(tl.maximum(length - offs_p * PROBE_ROWS, 0), PROBE_ROWS).to(tl.float32)
        share /= tl.minimum(tl.maximum(length - offs_p // PROBES * 128, 1), 128).to(tl.float32)
        share_of_mass = share / denominator
        tl.store(
            lse + sequence * probes + offs_p,
            (maximum + tl.log2(denominator)) * 0.6931471805599453,
            mask=offs_p < probes,
        )
        share /= denominator * denominator
        tile = block * TILES + tl.arange(0, TILES)
        target = errors + sequence * (probes // PROBES) * C
        target_bias = biases + sequence * (probes // PROBES) * C
        for c in range(0, C, TOGETHER):
            offs_c = c + tl.arange(0, TOGETHER)
            mask_c = (offs_c < C)[:, None]
            spot = offs_c[:, None] * BLOCK_P + lane[None, :]
            part = tl.load(found + spot, mask=mask_c, other=0.0)
            fade2 = tl.exp2(tl.load(under + spot, mask=mask_c, other=0.0) - maximum[None, :])
            # Multiplied in this order so that neither factor overflows the other.
            part = part * fade2 * share[None, :] * fade2
            part = tl.sum(tl.reshape(part, [TOGETHER, TILES, PROBES]), 2)
            inside = mask_c & (tile < probes // PROBES)[None, :]
            tl.store(target + tile[None, :] * C + offs_c[:, None], part, mask=inside)
            weight = tl.load(masses + spot, mask=mask_c, other=0.0) * fade2 * share_of_mass[None, :]
            lacking = weight * tl.load(gaps + spot, mask=mask_c, other=0.0)
            weight = tl.sum(tl.reshape(weight, [TOGETHER, TILES, PROBES]), 2)
            lacking = tl.sum(tl.reshape(lacking, [TOGETHER, TILES, PROBES]), 2)
            bias = tl.where(weight > 0.0, lacking / tl.maximum(weight, 1e-37), 0.0)
            tl.store(target_bias + tile[None, :] * C + offs_c[:, None], bias, mask=inside)
        tl.debug_barrier()


def probe_sums(
    means: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    centroids: Tensor,
    value_means: Tensor,
    sizes: Tensor,
    length: int,
    probe_rows: int,
    scale: float,
    return_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch both kernels; torch's own attention computes the outputs of probes."""
    batch, heads, probes, width = means.shape
    key_heads, count = centroids.shape[1:3]
    keys, depth = value.shape[2:]
    tiles = probes * probe_rows // TILE_ROWS
    errors = means.new_empty(batch, heads, tiles, count, dtype=torch.float32)
    biases = torch.empty_like(errors)
    output = means.new_empty(0, dtype=torch.float32)
    lse = means.new_empty(batch, heads, probes, dtype=torch.float32)
    if return_output:
        output = F.scaled_dot_product_attention(
            means, match_heads(key, heads), match_heads(value, heads), scale=scale
        ).float()
    if not errors.numel():
        return errors, biases, output, output
    starts = torch.nn.functional.pad(sizes.cumsum(-1, dtype=torch.int32), (1, 0))
    weighted = value_means.float() * sizes[..., None]
    constants = (weighted.sum(2) / max(keys, 1)).contiguous()
    rows = means.new_empty(batch, key_heads, keys + count, width)
    energy = rows.new_empty(rows.shape[:3], dtype=torch.float32)
    agreement = torch.empty_like(energy)
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    widths = max(16, triton.next_power_of_2(width)), triton.next_power_of_2(depth)
    chosen = BLOCKS[table_key(means)]
    block = max(chosen.rows, TILE_ROWS // probe_rows)
    blocks = triton.cdiv(probes, block)
    total = batch * heads * blocks
    programs = min(total, PROGRAMS * _multiprocessors(means.device))
    scratch = means.new_empty(programs, 4, count, block, dtype=torch.float32)
    with on(means.device):
        lay_out_kernel[(batch * key_heads * count,)](
            key, value, order.contiguous(), centroids.contiguous(), value_means.contiguous(),
            constants, starts, rows, energy, agreement, *key.stride()[:3], *value.stride()[:3],
            key_heads, keys, count, width, depth,
            BLOCK_N=16, BLOCK_D=widths[0], BLOCK_DV=widths[1], num_warps=2,
        )  # fmt: skip
        probe_sums_kernel[(programs,)](
            means.contiguous(), rows, energy, agreement, starts, errors, biases, lse, scratch,
            length, keys, probes, blocks, heads // key_heads, total, count, width, scale * LOG2_E,
            LARGEST_BIAS, PROBE_ROWS=probe_rows, PROBES=TILE_ROWS // probe_rows, BLOCK_P=block,
            BLOCK_N=chosen.columns, TOGETHER=TOGETHER,
            ALL_C=triton.next_power_of_2(count), BLOCK_D=widths[0],
            PRECISION="ieee" if means.dtype == torch.float32 else "tf32",
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
    return errors, biases, output, lse


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
