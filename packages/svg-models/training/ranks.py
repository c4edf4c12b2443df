"""Share each step of training among the processes of `torchrun`, one GPU each."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "Ranks", "join"]


@dataclass(frozen=True)
class Ranks:
    """Say which of several processes this one is.

    Attributes:
        rank: of this process; the first one logs and stores.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Return whether this process logs and stores."""
        return self.rank == 0

    def agree(self, value: float) -> float:
        """Return the first process's value in all of them, without waiting for a GPU."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return float(shared)

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their means over the processes, in one message."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        parts = flat.split([tensor.numel() for tensor in tensors])
        pairs = zip(parts, tensors, strict=True)
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in pairs])

    @torch.no_grad()
    def drift(self, tensors: Sequence[Tensor]) -> float:
        """Return the largest difference of a tensor's sum among the processes; 0 if all agree."""
        if self.count == 1:
            return 0.0
        sums = torch.stack([tensor.double().sum() for tensor in tensors])
        least, most = sums.clone(), sums.clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return (most - least).max().item()

    def wait(self) -> None:
        """Return when every process came here."""
        if self.count > 1:
            dist.all_reduce(torch.zeros(1))

    def leave(self) -> None:
        """Wait for the others, then close what `join` opened."""
        if self.count > 1:
            self.wait()
            dist.destroy_process_group()


ALONE = Ranks()


def join(device: str) -> tuple[Ranks, str]:
    """Return the ranks that `torchrun` started, and this one's device; one rank without it.

    The first speaks for all: what the others print goes nowhere.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE, device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        # Numbers that the host decides by travel on the host.
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), count)
    if not ranks.first:
        sys.stdout = io.StringIO()
    return ranks, device
