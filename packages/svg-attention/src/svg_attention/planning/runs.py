"""Merging what a query tile keeps into runs of consecutive keys.

All functions have static output shapes and never wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svg_attention._ops import define_op
from svg_attention.planning.dispatch import select_planner


def cluster_runs(
    mask: Tensor, sizes: Tensor, *, tail: Tensor | int = 0, full: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the runs of selected key clusters, over keys that are sorted by cluster.

    Cluster `j` occupies the rows after those of clusters `0 .. j-1`. After the last cluster
    stand `tail` further rows (text) that every tile reads.

    Args:
        mask: bool `[B, H, T, C]`, the clusters each query tile reads.
        sizes: integers `[B, H, C]`, keys of each cluster.
        tail: rows after the clusters: a number, or integers `[B]`.
        full: bool broadcastable with `[B, H, T]`, tiles that read every row; None for none.

    Returns:
        `(run_starts, run_lengths)`, int32 `[B, H, T, (C + 2) // 2]`.
    """
    shared = full is not None and full.dim() == 3 and full.shape[1] == 1
    if full is not None and not shared:
        mask, full = mask | full[..., None], None
    ends = cluster_ends(sizes, tail)
    whole = None if full is None else full[:, 0].expand(mask.shape[0], mask.shape[2])
    return merge_clusters(mask, ends, full=whole)


def cluster_ends(sizes: Tensor, tail: Tensor | int) -> Tensor:
    """Return one past the last row of each cluster, then of the tail: int32 `[B, H, C + 1]`."""
    if isinstance(tail, Tensor):
        last = tail.to(sizes.dtype)[:, None, None].expand(*sizes.shape[:2], 1)
        rows = torch.cat([sizes, last], dim=-1)
    else:
        rows = torch.nn.functional.pad(sizes, (0, 1), value=tail)
    return rows.cumsum(dim=-1, dtype=torch.int32)


def merge_clusters(
    mask: Tensor,
    ends: Tensor,
    *,
    full: Tensor | None = None,
    multiple: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Merge the clusters each tile reads into runs of consecutive key rows.

    Cluster `j` occupies the rows from `ends[j - 1]` to `ends[j]`; neighbours that touch become one
    run. A last segment, from `ends[C - 1]` to `ends[C]`, is read by every tile.

    Args:
        mask: bool `[B, H, T, C]`.
        ends: int32 `[B, H, C + 1]`, not decreasing.
        full: bool `[B, T]`, tiles that read every row; None for none.
        multiple: rows that every run is made a multiple of, as by `round_runs` with the end of the
            last segment for a limit.
        backend: `"auto"`, `"triton"` or `"reference"`.

    Returns:
        `(run_starts, run_lengths)`, int32 `[B, H, T, (C + 2) // 2]`; used slots come first and
        ascend, the others are 0.

    Raises:
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device.
    """
    batch, heads, tiles, count = mask.shape
    if tuple(ends.shape) != (batch, heads, count + 1) or ends.device != mask.device:
        raise ValueError(f"ends must be {[batch, heads, count + 1]}, got {list(ends.shape)}")
    if full is not None and tuple(full.shape) != (batch, tiles):
        raise ValueError(f"full must be {[batch, tiles]}, got {list(full.shape)}")
    starts, lengths = _merge_clusters(mask, ends, full, multiple, backend)
    return starts, lengths


def round_runs(
    run_starts: Tensor, run_lengths: Tensor, *, multiple: int, limit: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Round every run up to a multiple of rows by reading the real keys that follow.

    Runs fewer than `multiple` rows apart become one, so that no key is read twice. Only a run that
    would pass `limit` keeps another length.

    Args:
        run_starts: int32 `[B, H, T, R]`, ascending, used slots first.
        run_lengths: int32 `[B, H, T, R]`, 0 marks an unused slot.
        multiple: rows.
        limit: int32 `[B]`, one past the last valid key.
        backend: `"auto"`, `"triton"` or `"reference"`.

    Returns:
        `(run_starts, run_lengths)` of the same shapes.

    Raises:
        ValueError: if a shape does not fit or the devices differ.
        UnsupportedError: if `backend` cannot run on this device.
    """
    if run_starts.shape != run_lengths.shape or run_starts.ndim != 4:
        raise ValueError(
            "run_starts and run_lengths must both be [B, H, T, R], "
            f"got {list(run_starts.shape)} and {list(run_lengths.shape)}"
        )
    if tuple(limit.shape) != (run_starts.shape[0],):
        raise ValueError(f"limit must be {[run_starts.shape[0]]}, got {list(limit.shape)}")
    starts, lengths = _round_runs(run_starts, run_lengths, multiple, limit, backend)
    return starts, lengths


def _run_merge(
    mask: Tensor, ends: Tensor, full: Tensor | None, multiple: int, backend: str
) -> tuple[Tensor, Tensor]:
    starts, lengths = select_planner(backend, mask.device).merge_clusters(
        mask, ends, full, multiple
    )
    return starts, lengths


def _run_round(
    run_starts: Tensor, run_lengths: Tensor, multiple: int, limit: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    starts, lengths = select_planner(backend, run_starts.device).round_runs(
        run_starts, run_lengths, multiple, limit
    )
    return starts, lengths


def _fake_merge(
    mask: Tensor, ends: Tensor, full: Tensor | None, multiple: int, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (*mask.shape[:3], (mask.shape[3] + 2) // 2)
    return ends.new_empty(shape), ends.new_empty(shape)


def _fake_round(
    run_starts: Tensor, run_lengths: Tensor, multiple: int, limit: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return run_starts.new_empty(run_starts.shape), run_starts.new_empty(run_starts.shape)


_merge_clusters = define_op(
    "merge_clusters",
    "(Tensor mask, Tensor ends, Tensor? full, int multiple, str backend) -> (Tensor, Tensor)",
    _run_merge,
    _fake_merge,
)
_round_runs = define_op(
    "round_runs",
    "(Tensor run_starts, Tensor run_lengths, int multiple, Tensor limit, str backend)"
    " -> (Tensor, Tensor)",
    _run_round,
    _fake_round,
)
