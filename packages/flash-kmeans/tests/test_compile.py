"""Every row of the tile table compiles and fits, for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash_kmeans.triton import launch_config

SCRIPT = Path(__file__).with_name("compile_kernels.py")


def twin_of(capability: launch_config.Capability) -> dict[tuple[int, int], launch_config.Tile]:
    """Return the table whose rows are compiled for another capability of the same kind."""
    twins = {(8, 6): (8, 0), (8, 9): (8, 6)}
    return launch_config.TABLE[twins[capability]] if capability in twins else {}


@pytest.mark.parametrize("capability", launch_config.TABLE, ids=lambda c: f"{c[0]}.{c[1]}")
def test_TABLE_rows_fit_shared_memory(capability: launch_config.Capability, tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.6", reason="descriptors are spelled as in 3.6")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "{}.{}".format(*capability)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    own = [
        t for key, t in launch_config.TABLE[capability].items() if t != twin_of(capability).get(key)
    ]
    # Five more count labels, sum clusters and finish them; Hopper has a kernel of its own besides.
    assert len(rows) == len(own) + 5 + (capability == (9, 0))
    for row in rows:
        assert row["shared"] <= launch_config.SHARED_MEMORY[capability], row
        if capability == (8, 0) and row.get("shared_with_twin"):
            assert row["shared"] <= launch_config.SHARED_MEMORY[8, 6], row
    assigns = [row for row in rows if row["kernel"].startswith("assign")]
    assert all((row["bulk"] > 0) == (capability >= (9, 0)) for row in assigns), assigns
    assert all((row["wgmma"] > 0) == (capability == (9, 0)) for row in assigns), assigns


def test_table_for_unknown_capabilities_is_the_nearest_lower_one() -> None:
    assert launch_config.table_for((8, 7)) is launch_config.TABLE[8, 6]
    assert launch_config.table_for((11, 0)) is launch_config.TABLE[10, 0]
    assert launch_config.table_for((13, 0)) is launch_config.TABLE[12, 0]


@pytest.mark.parametrize(
    ("dim", "clusters", "points", "expected"),
    [
        (128, 1000, 75_600, (128, 128, 128)),
        # 300 is 5 steps of 64, but 3 of 128 and a third of the last one padding.
        (128, 300, 75_600, (128, 64, 128)),
        (100, 5, 75_600, (128, 16, 128)),
        (1, 64, 75_600, (128, 64, 16)),
        (513, 1000, 75_600, (128, 128, 64)),
    ],
)
def test_tile_for_follows_the_problem(
    dim: int, clusters: int, points: int, expected: tuple[int, int, int]
) -> None:
    tile = launch_config.tile_for((9, 0), 2, dim, clusters, points)
    assert (tile.block_n, tile.block_k, tile.block_d) == expected
