"""Checks of orders and runs on the device, for those who plan themselves: `SVG_DEBUG=1`.

Without them an index out of range reads or writes memory of others. They wait for the device and
cost a pass over the indices, so they are off unless asked for.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

ENABLED = os.environ.get("SVG_DEBUG") == "1"


def check_order(name: str, order: Tensor, rows: int, *, permutation: bool) -> None:
    """Raise unless the last axis of `order` holds rows, or with `permutation` each row once.

    Args:
        name: of the argument, for the message.
        order: `[..., T]`, integers.
        rows: how many there are.
        permutation: whether each of `0 .. rows - 1` must be there exactly once.

    Raises:
        ValueError: if an index is out of range, or a row is missing. Where a CUDA graph is being
            captured a device-side assertion takes its place when the graph runs.
    """
    outside = (order < 0) | (order >= rows)
    _require(~outside, f"{name} must hold rows 0 to {rows - 1}", order)
    if permutation:
        expected = torch.arange(rows, device=order.device, dtype=order.dtype)
        found = order.sort(dim=-1).values
        _require(found == expected, f"{name} must hold each of {rows} rows once, sorted", found)


def check_runs(run_starts: Tensor, run_lengths: Tensor, key_rows: int) -> None:
    """Raise unless the runs of each tile lie within the keys, are disjoint, and come before zeros.

    Args:
        run_starts: `[..., R]`.
        run_lengths: `[..., R]`.
        key_rows: rows of the keys.

    Raises:
        ValueError: as `check_order`.
    """
    used = run_lengths > 0
    ends = run_starts + run_lengths
    _require(run_lengths >= 0, "run_lengths must be at least 0", run_lengths)
    _require(~used | (run_starts >= 0), "run_starts must be at least 0", run_starts)
    _require(~used | (ends <= key_rows), f"runs must end within {key_rows} key rows", ends)
    _require(
        ~used[..., 1:] | used[..., :-1],
        "used runs must come before unused ones",
        run_lengths[..., 1:],
    )
    # Sorted by start, unused ones last: each must begin where the one before has ended, or later.
    far = torch.iinfo(run_starts.dtype).max
    starts, place = torch.where(used, run_starts, far).sort(dim=-1)
    stops = torch.where(used, ends, far).gather(-1, place)
    _require(starts[..., 1:] >= stops[..., :-1], "runs of a tile must be disjoint", starts[..., 1:])


def check_sizes(name: str, sizes: Tensor, rows: int) -> None:
    """Raise unless the sizes along the last axis are at least 0 and add up to `rows`.

    Args:
        name: of the argument, for the message.
        sizes: `[..., C]`, integers.
        rows: what they add up to.

    Raises:
        ValueError: as `check_order`.
    """
    _require(sizes >= 0, f"{name} must be at least 0", sizes)
    total = sizes.sum(dim=-1)
    _require(total == rows, f"{name} must add up to {rows}", total)


def _require(holds: Tensor, sentence: str, values: Tensor) -> None:
    """Raise ValueError that names the first place where `holds` is False."""
    if holds.is_cuda and torch.cuda.is_current_stream_capturing():
        torch._assert_async(holds.all(), f"{sentence} (SVG_DEBUG=1)")
        return
    if not holds.all():
        place = tuple(int(index) for index in (~holds).nonzero()[0])
        raise ValueError(
            f"{sentence}, got {int(values[place])} at {list(place)} (checked because SVG_DEBUG=1)"
        )
