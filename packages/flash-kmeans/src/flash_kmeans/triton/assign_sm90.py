"""Nearest-centroid labels on Hopper, warp-specialised: same scores, other choreography.

One warp keeps tiles of points and centroids coming through the bulk copy engine; two warpgroups
each own `BLOCK_N` points. They share the centroids but wait for nothing else, so that while one
folds its scores into the running best the other keeps the tensor cores busy. Programs are
persistent and fetch the next points while the last centroids of this tile are at work.

Biases are loaded by those who add them. Through shared memory, beside the centroids, they gain 3 %
at 8,192 clusters, which do not fit into L1, and cost 20 % at 1,000 (measured on an H200).

Gluon, Triton's lower level, is experimental: this runs with the versions of Triton it was measured
with, and `assign.py` serves everywhere else.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

DIM = 128
BLOCK_N = 128
BLOCK_K = 128
STAGES = 3
GROUPS = 2
WARPS = 4


@gluon.jit
def _larger(a_score, a_index, b_score, b_index):
    take = b_score > a_score
    return gl.where(take, b_score, a_score), gl.where(take, b_index, a_index)


@gluon.jit
def _larger_or_first(a_score, a_index, b_score, b_index):
    take = (b_score > a_score) | ((b_score == a_score) & (b_index < a_index))
    return gl.where(take, b_score, a_score), gl.where(take, b_index, a_index)


@gluon.jit
def _fold(scores, best, where, k, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr):
    """Fold one tile of scores into the running best of each row and lane, as in `assign.py`."""
    groups: gl.constexpr = BLOCK_K // 8
    split = gl.reshape(scores, [BLOCK_N, groups, 4, 2])
    layout: gl.constexpr = split.type.layout
    group = gl.arange(
        0, groups, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    )
    pair = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    group = gl.expand_dims(gl.expand_dims(gl.expand_dims(group * 2, 0), 2), 3)
    place = group + gl.expand_dims(gl.expand_dims(gl.expand_dims(pair, 0), 1), 2)
    place = place + gl.full([BLOCK_N, groups, 4, 2], 0, gl.int32, layout)
    score, index = gl.reduce((split, place), 3, _larger)
    score, index = gl.reduce((score, index), 1, _larger)
    take = score > best
    best = gl.where(take, score, best)
    where = gl.where(take, index + k * (BLOCK_K // 4), where)
    return best, where


@gluon.jit
def _produce(
    points, directions, x_tiles, c_tiles, x_full, x_empty, c_full, c_empty, row_step, column_step,
    n_tiles, k_tiles, total, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    count = 0
    turn = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        b = tile // n_tiles
        row = b * row_step + (tile % n_tiles) * (BLOCK_N * GROUPS)
        slot = turn % 2
        mbarrier.wait(x_empty.index(slot), ((turn // 2) & 1) ^ 1)
        mbarrier.expect(x_full.index(slot), GROUPS * BLOCK_N * D * 2)
        for group in gl.static_range(GROUPS):
            tma.async_copy_global_to_shared(
                points, [row + group * BLOCK_N, b * column_step], x_full.index(slot),
                x_tiles.index(slot * GROUPS + group),
            )  # fmt: skip
        turn += 1  # noqa: SIM113
        for k in range(k_tiles):
            stage = count % STAGES
            mbarrier.wait(c_empty.index(stage), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(c_full.index(stage), BLOCK_K * D * 2)
            tma.async_copy_global_to_shared(
                directions, [(b * k_tiles + k) * BLOCK_K, 0], c_full.index(stage),
                c_tiles.index(stage),
            )  # fmt: skip
            count += 1


@gluon.jit
def _consume(
    GROUP: gl.constexpr, bias, labels, x_tiles, c_tiles, x_full, x_empty, c_full, c_empty, N,
    n_tiles, k_tiles, total, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, 16]
    )
    zero = gl.full([BLOCK_N, BLOCK_K], 0.0, gl.float32, layout)
    offs_k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    split: gl.constexpr = gl.reshape(zero, [BLOCK_N, BLOCK_K // 8, 4, 2]).type.layout
    lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, split))
    count = 0
    turn = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        b = tile // n_tiles
        best = gl.full([BLOCK_N, 4], -float("inf"), gl.float32, lanes)
        where = gl.full([BLOCK_N, 4], 0, gl.int32, lanes)
        shifts = bias + b * (k_tiles * BLOCK_K) + offs_k
        slot = turn % 2
        mbarrier.wait(x_full.index(slot), (turn // 2) & 1)
        x = x_tiles.index(slot * GROUPS + GROUP)
        for k in range(k_tiles):
            shift = gl.load(shifts)
            stage = count % STAGES
            mbarrier.wait(c_full.index(stage), (count // STAGES) & 1)
            pending = warpgroup_mma(
                x, c_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            scores = warpgroup_mma_wait(0, deps=[pending])
            mbarrier.arrive(c_empty.index(stage), count=1)
            best, where = _fold(scores + shift[None, :], best, where, k, BLOCK_N, BLOCK_K)
            shifts += BLOCK_K
            count += 1
        mbarrier.arrive(x_empty.index(slot), count=1)
        lane = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, lanes)), 0)
        place = where % (BLOCK_K // 4)
        column = (where // (BLOCK_K // 4)) * BLOCK_K + (place // 2) * 8 + lane * 2 + place % 2
        _, label = gl.reduce((best, column), 1, _larger_or_first)
        rows = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, lanes))
        rows += (tile % n_tiles) * (BLOCK_N * GROUPS) + GROUP * BLOCK_N
        gl.store(labels + b.to(gl.int64) * N + rows, label, mask=rows < N)
        turn += 1  # noqa: SIM113


@gluon.jit
def _consume_first(
    bias, labels, x_tiles, c_tiles, x_full, x_empty, c_full, c_empty, N, n_tiles, k_tiles, total,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    _consume(
        0, bias, labels, x_tiles, c_tiles, x_full, x_empty, c_full, c_empty, N, n_tiles, k_tiles,
        total, BLOCK_N, BLOCK_K, STAGES, GROUPS,
    )  # fmt: skip


@gluon.jit
def _consume_second(
    bias, labels, x_tiles, c_tiles, x_full, x_empty, c_full, c_empty, N, n_tiles, k_tiles, total,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    _consume(
        1, bias, labels, x_tiles, c_tiles, x_full, x_empty, c_full, c_empty, N, n_tiles, k_tiles,
        total, BLOCK_N, BLOCK_K, STAGES, GROUPS,
    )  # fmt: skip


@gluon.jit
def assign_kernel(
    points, directions, bias, labels, N, row_step, column_step, n_tiles, k_tiles, total,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):  # fmt: skip
    """Write the label of each point: a producer warp and two consumer warpgroups, persistent.

    Batch `b` begins `b * row_step` rows and `b * column_step` columns into `points`. A tile that
    runs past its last point reads what follows, and nothing comes of it.
    """
    x_tiles = gl.allocate_shared_memory(points.dtype, [2 * GROUPS, BLOCK_N, D], points.layout)
    c_tiles = gl.allocate_shared_memory(directions.dtype, [STAGES, BLOCK_K, D], directions.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    c_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    c_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(x_full.index(slot), count=1)
        mbarrier.init(x_empty.index(slot), count=GROUPS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(c_full.index(stage), count=1)
        mbarrier.init(c_empty.index(stage), count=GROUPS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume_first, (
                bias, labels, x_tiles, c_tiles, x_full, x_empty, c_full, c_empty, N, n_tiles,
                k_tiles, total, BLOCK_N, BLOCK_K, STAGES, GROUPS,
            )),
            (_consume_second, (
                bias, labels, x_tiles, c_tiles, x_full, x_empty, c_full, c_empty, N, n_tiles,
                k_tiles, total, BLOCK_N, BLOCK_K, STAGES, GROUPS,
            )),
            (_produce, (
                points, directions, x_tiles, c_tiles, x_full, x_empty, c_full, c_empty, row_step,
                column_step, n_tiles, k_tiles, total, BLOCK_N, BLOCK_K, D, STAGES, GROUPS,
            )),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


def shared_layout(rows: int, dtype):
    """Return the swizzled shared-memory layout of a `[rows, DIM]` tile of a torch dtype's twin."""
    return gl.NVMMASharedLayout.get_default_for([rows, DIM], dtype)
