"""Memory that processes on a CPU write into each other's, as GPUs do."""

from __future__ import annotations

import tempfile
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class MappedFiles:
    """Memory of which each rank has as much and all can write, as `PeerMemory` is."""

    def __init__(self, group: Any, size: int, device: torch.device) -> None:
        self.size, self._group = size, group
        folder = [tempfile.mkdtemp() if dist.get_rank(group) == 0 else ""]
        dist.broadcast_object_list(folder, group=group, group_src=0)
        names = [str(Path(folder[0]) / str(n)) for n in range(dist.get_world_size(group))]
        self._bytes = [
            torch.from_file(name, shared=True, size=size, dtype=torch.uint8) for name in names
        ]
        dist.barrier(group)
        for path in map(Path, names):
            path.unlink(missing_ok=True)
        dist.barrier(group)
        if dist.get_rank(group) == 0:
            Path(folder[0]).rmdir()
        self._bytes[dist.get_rank(group)].fill_(255)  # NaN, for whoever reads what nobody wrote
        dist.barrier(group)

    def view(self, rank: int, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = prod(shape) * dtype.itemsize
        assert start + size <= self.size
        return self._bytes[rank][start : start + size].view(dtype).view(shape)

    def barrier(self, channel: int) -> None:
        dist.barrier(self._group)
