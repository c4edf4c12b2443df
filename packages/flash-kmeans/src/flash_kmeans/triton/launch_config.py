"""Launch parameters of the assign kernel, per compute capability, width and element size.

Two rows of 9.0 are measured, and say where and when. The others follow their shape within the
shared memory of their capability; they have not been measured. A capability that is not listed
takes the row of the nearest lower one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

Capability = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Launch parameters of the assign kernel.

    Attributes:
        block_n: points per program.
        block_k: centroids per step, a power of two of at least 16.
        block_d: features per step, a power of two of at least 16.
        warps: warps per program.
        stages: depth of the load pipeline.
        measured: the GPU and month on which the row was chosen; empty if it never was.
    """

    block_n: int
    block_k: int
    block_d: int
    warps: int
    stages: int
    measured: str = ""


# Bytes of shared memory that one program may use.
SHARED_MEMORY: dict[Capability, int] = {
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (12, 0): 101_376,
}

_LARGE = {
    (2, 32): Tile(block_n=128, block_k=128, block_d=32, warps=8, stages=3),
    (2, 64): Tile(block_n=128, block_k=128, block_d=64, warps=8, stages=3),
    (2, 128): Tile(block_n=128, block_k=128, block_d=128, warps=8, stages=2),
    (2, 256): Tile(block_n=64, block_k=64, block_d=256, warps=4, stages=2),
    (2, 512): Tile(block_n=64, block_k=32, block_d=512, warps=4, stages=2),
    (2, 0): Tile(block_n=128, block_k=128, block_d=64, warps=8, stages=3),
    (4, 32): Tile(block_n=64, block_k=64, block_d=32, warps=4, stages=2),
    (4, 64): Tile(block_n=64, block_k=64, block_d=64, warps=4, stages=2),
    (4, 128): Tile(block_n=64, block_k=64, block_d=128, warps=4, stages=2),
    (4, 0): Tile(block_n=64, block_k=64, block_d=32, warps=4, stages=2),
}
_SMALL = {
    **_LARGE,
    (2, 64): Tile(block_n=128, block_k=64, block_d=64, warps=8, stages=2),
    (2, 128): Tile(block_n=128, block_k=64, block_d=128, warps=8, stages=2),
    (2, 256): Tile(block_n=64, block_k=32, block_d=256, warps=4, stages=2),
    (2, 0): Tile(block_n=64, block_k=64, block_d=64, warps=4, stages=2),
    (4, 128): Tile(block_n=32, block_k=32, block_d=128, warps=4, stages=2),
}
del _SMALL[2, 512]

# Keys are (bytes per element, features kept at once); zero features mean a loop over them.
TABLE: dict[Capability, dict[tuple[int, int], Tile]] = {
    (8, 0): _LARGE,
    (8, 6): _SMALL,
    (8, 9): _SMALL,
    (9, 0): {
        **_LARGE,
        (2, 128): replace(_LARGE[2, 128], measured="H200, 2026-11"),
        (2, 256): replace(_LARGE[2, 256], measured="H200, 2026-11"),
    },
    (10, 0): _LARGE,
    (12, 0): _SMALL,
}


def next_power(value: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `value` and at least `least`."""
    return max(least, 1 << max(0, value - 1).bit_length())


def table_for(capability: Capability) -> dict[tuple[int, int], Tile]:
    """Return the rows for a capability, or those of the nearest lower one."""
    return TABLE[max((known for known in TABLE if known <= capability), default=(8, 0))]


def tile_for(
    capability: Capability, itemsize: int, dim: int, n_clusters: int, n_points: int
) -> Tile:
    """Return the launch parameters for one batch's points, features and centroids."""
    table = table_for(capability)
    widths = [width for size, width in table if size == itemsize and width >= dim]
    tile = table[itemsize, min(widths, default=0)]
    if tile.block_d >= dim:
        tile = replace(tile, block_d=next_power(dim, 16))
    block_n = min(tile.block_n, next_power(n_points, 16 * tile.warps))
    return replace(tile, block_n=block_n, block_k=_block_k(tile.block_k, n_clusters))


def _block_k(largest: int, n_clusters: int) -> int:
    """Take a narrower step where the last one would otherwise be mostly padding."""
    block = min(largest, next_power(n_clusters, 16))
    half = block // 2
    padded = -(-n_clusters // block) * block
    narrower = -(-n_clusters // half) * half
    return half if half >= 64 and narrower < 0.9 * padded else block
