"""The processes of a ring, and what they send each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Travelling:
    """Hold tensors on their way from the process before, while this one computes.

    Attributes:
        tensors: what arrives; not to be read before `arrived`.
        requests: what to wait for.
        sent: what is being sent, kept until it is gone.
    """

    tensors: tuple[Tensor, ...]
    requests: tuple[Any, ...]
    sent: tuple[Tensor, ...]

    def arrived(self) -> tuple[Tensor, ...]:
        """Return the tensors once they are here; on a GPU only its stream waits."""
        for request in self.requests:
            request.wait()
        return self.tensors


class Ring:
    """Processes that each hold a share of the video tokens, in their order.

    Args:
        group: the processes; the default group when None.
        parts: of how many parts that are dealt out in turn a share consists, where others, too,
            hold some of it.

    Attributes:
        group: the processes.
        rank: this process's place among them.
        size: how many there are.
        parts: as given.

    Raises:
        RuntimeError: if torch.distributed is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, parts: int = 1) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "a ring needs torch.distributed; call init_process_group, or start the script "
                "with torchrun"
            )
        self.group, self.parts = group, parts
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def shares(self, tokens: int) -> tuple[int, ...]:
        """Return how many of some tokens each process holds: of equal parts, larger ones first."""
        size, more = divmod(tokens, self.size * self.parts)
        first = range(0, self.size * self.parts, self.parts)
        return tuple(self.parts * size + min(max(more - n, 0), self.parts) for n in first)

    def holder(self, passes: int) -> int:
        """Return whose share is here after some passes."""
        return (self.rank - passes) % self.size

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the processes, the same on each to the last bit; `x` is changed."""
        dist.all_reduce(x, group=self.group)
        return x

    def any(self, flags: Tensor) -> Tensor:
        """Return which flags are set on some process."""
        return self.sum(flags.to(torch.int32)) > 0

    def gather(self, x: Tensor) -> Tensor:
        """Return `[size, ...]`, what each process has."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def from_first(self, x: Tensor) -> Tensor:
        """Return what the first process has; `x` is changed."""
        dist.broadcast(x, src=self._global_rank(0), group=self.group)
        return x

    def pass_on(self, tensors: Sequence[Tensor], rows: int) -> Travelling:
        """Send tensors to the next process, and begin to take those of the one before.

        Args:
            tensors: `[B, H, N, D]`.
            rows: N of what arrives.
        """
        sent = tuple(x.contiguous() for x in tensors)
        taken = tuple(x.new_empty(*x.shape[:2], rows, x.shape[3]) for x in sent)
        after = self._global_rank((self.rank + 1) % self.size)
        before = self._global_rank(self.rank - 1)
        works = [dist.P2POp(dist.isend, x, after, self.group) for x in sent]
        works += [dist.P2POp(dist.irecv, x, before, self.group) for x in taken]
        requests = tuple(dist.batch_isend_irecv(works))
        return Travelling(tensors=taken, requests=requests, sent=sent)

    def _global_rank(self, rank: int) -> int:
        rank %= self.size
        return rank if self.group is None else dist.get_global_rank(self.group, rank)
