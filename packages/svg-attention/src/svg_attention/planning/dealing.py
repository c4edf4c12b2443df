"""Dealing the heads of a layer to processes, so that all have as much to compute."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_attention._ops import define_op
from svg_attention.planning.dispatch import select_planner


def deal_heads(cost: Tensor, ranks: int, *, backend: str = "auto") -> Tensor:
    """Deal heads out by what they cost, the most expensive first, each to who has least so far.

    Every process gets as many heads as another, the first ones one more where they do not divide:
    the counts of `torch.tensor_split`. Nothing waits for the device.

    Args:
        cost: fp32 `[H]`, not negative; one that is no number counts as 0.
        ranks: processes.
        backend: `"auto"`, `"triton"` or `"reference"`.

    Returns:
        int64 `[H]`, a permutation: the heads of the first process, then those of the second, ...

    Raises:
        TypeError: if `cost` is not fp32.
        ValueError: if it is no vector or there is no process.
        UnsupportedError: if `backend` cannot run on this device.

    Source: Graham 1969, "Bounds on multiprocessing timing anomalies" (longest processing time
    first), with a bound on the number of jobs.
    """
    if cost.dim() != 1:
        raise ValueError(f"cost must be one number for each head, [H], got {list(cost.shape)}")
    if cost.dtype != torch.float32:
        raise TypeError(f"cost must be fp32, got {cost.dtype}; use cost.float()")
    if ranks < 1:
        raise ValueError(f"heads are dealt to at least one process, got {ranks}")
    order: Tensor = _deal_heads(cost, ranks, backend)
    return order


def counts_of_heads(heads: int, ranks: int) -> list[int]:
    """Return how many heads each process has, the first ones one more at most."""
    return [heads // ranks + (rank < heads % ranks) for rank in range(ranks)]


def _run(cost: Tensor, ranks: int, backend: str) -> Tensor:
    cost = torch.nan_to_num(cost, nan=0.0)
    by_cost = cost.argsort(descending=True, stable=True)
    order: Tensor = select_planner(backend, cost.device).deal_heads(cost, by_cost, ranks)
    return order


def _fake(cost: Tensor, ranks: int, backend: str) -> Tensor:
    return cost.new_empty(cost.shape, dtype=torch.int64)


_deal_heads = define_op(
    "deal_heads", "(Tensor cost, int ranks, str backend) -> Tensor", _run, _fake
)
