"""Memory of a GPU that the other ranks of its host write into: torch's symmetric memory."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from svg_attention import UnsupportedError
from svg_models.copies import copy_beside, copy_bits
from svg_models.errors import first_line

__all__ = ["PeerMemory"]

# Bytes that each rank writes into the memory of each other one, to see whether they arrive.
_CHECKED = 1 << 14
# How long a rank waits for others at a barrier, as long as NCCL by default.
_TIMEOUT_MS = 10 * 60 * 1000
# A path of a socket may be so long.
_LONGEST_PATH = 107
# Each process may see one GPU alone, which is then its first: torch takes equal numbers for one and
# the same, unless told otherwise. Multicast is of no use here, and not to be had everywhere.
_SETTINGS = ("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "TORCH_SYMM_MEM_DISABLE_MULTICAST")


class PeerMemory:
    """Memory of which every rank has as much, and which every rank can write.

    Every rank of the group has to make it. They agree: it is there for all, or for none.

    Args:
        group: the ranks; None for all.
        size: in bytes, the same on every rank.
        device: of this rank.

    Raises:
        UnsupportedError: on every rank, if one of them cannot; it says why.

    Attributes:
        size: in bytes.
        made: how often this process has met other ranks to make such memory.
    """

    made: ClassVar[int] = 0

    def __init__(self, group: Any, size: int, device: torch.device) -> None:
        group = dist.group.WORLD if group is None else group
        self.size = size
        _refuse_groups(group, device, self.made)
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        memory, problem, room = None, "", size + ranks * _CHECKED
        try:
            memory = _empty(room, device)
        except (RuntimeError, AttributeError, ImportError) as error:
            problem = _problem(error)
        _agree(group, problem)
        PeerMemory.made += 1
        try:
            self._handle = _rendezvous(memory, group)
            self._bytes = [self._handle.get_buffer(n, (room,), torch.uint8) for n in range(ranks)]
            self._write_blocks(rank)
        except (RuntimeError, AttributeError, TypeError, OSError) as error:
            problem = _problem(error)
        _agree(group, problem)
        self._memory = memory  # lives as long as this
        self.barrier(0)
        _agree(group, "" if self._has_blocks(rank) else "what GPUs write does not arrive")

    def view(self, rank: int, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor in the memory of a rank.

        Args:
            rank: in the group.
            start: its first byte, a multiple of 16.
            shape: of the tensor.
            dtype: of the tensor.
        """
        size = prod(shape) * dtype.itemsize
        return self._bytes[rank].narrow(0, start, size).view(dtype).view(shape)

    def _write_blocks(self, rank: int) -> None:
        """Write known bytes into the memory of each rank, in every way that there is."""
        for memory in self._bytes:
            block = _block(rank, memory.device)
            there = memory[self.size + rank * _CHECKED :][:_CHECKED].view(block.shape)
            copy_beside(there[:, :, :1], block[:, :, :1])
            copy_bits(there[:, :, 1:], block[:, :, 1:])

    def _has_blocks(self, rank: int) -> bool:
        """Return whether what all have written is here."""
        here = self._bytes[rank][self.size :].split(_CHECKED)
        return all(torch.equal(x, _block(n, x.device).flatten()) for n, x in enumerate(here))

    def barrier(self, channel: int) -> None:
        """Have what the current stream runs next wait until all ranks' streams have come here.

        What ranks have written before is then seen by all. The host does not wait.

        Args:
            channel: one for each barrier between two of which streams need not wait for each other.
        """
        self._handle.barrier(channel, _TIMEOUT_MS)


def _block(writer: int, device: torch.device) -> Tensor:
    numbers = torch.arange(_CHECKED, device=device) * (writer + 3) % 251
    return numbers.to(torch.uint8).view(1, 8, 2, -1)


def _refuse_groups(group: Any, device: torch.device, made: int) -> None:
    """Refuse ranks that cannot reach each other's memory, before they try: they would wait.

    Those, too, that have made such memory unequally often, in groups of which some were no part:
    torch numbers what ranks tell each other by process instead of by group (pytorch issue 196082).
    """
    folder = tempfile.gettempdir() if "TMPDIR" not in os.environ else os.environ["TMPDIR"]
    problem = ""
    if device.type != "cuda":
        problem = f"the tensors are on {device}, not on a GPU"
    elif not os.access(folder, os.W_OK) or len(f"{folder}/symm_mem-{os.getpid()}") > _LONGEST_PATH:
        problem = f"no socket can be made in the folder of temporary files, {folder}"
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = socket.gethostname() + (boot.read_text(encoding="ascii") if boot.exists() else "")
    card = str(torch.cuda.get_device_properties(device).uuid) if not problem else str(os.getpid())
    ranks = _gather(group, (problem, host, card, folder, made))
    problems, hosts, cards, folders, counts = (
        list(dict.fromkeys(one)) for one in zip(*ranks, strict=True)
    )
    refusals = [
        *filter(None, problems),
        *["the ranks are on several hosts"] * (len(hosts) > 1),
        *["several ranks share a GPU"] * (len(cards) < len(ranks)),
        *["the ranks have different folders of temporary files"] * (len(folders) > 1),
        *["some ranks have shared memory in groups without the others"] * (len(counts) > 1),
    ]
    if refusals:
        raise UnsupportedError({"direct": refusals[0]})


def _empty(size: int, device: torch.device) -> Tensor:
    """Allocate outside of torch's pools.

    Of a pool two ranks may be given different blocks, whose handles others keep from before.
    """
    from torch.distributed import _symmetric_memory as symmetric

    make = symmetric._SymmetricMemory.empty_strided_p2p
    try:
        return make((size,), (1,), torch.uint8, device)
    except RuntimeError:  # perhaps since torch holds memory that nobody uses
        torch.cuda.empty_cache()
        return make((size,), (1,), torch.uint8, device)


def _rendezvous(memory: Any, group: Any) -> Any:
    from torch.distributed import _symmetric_memory as symmetric

    with _settings():
        return symmetric.rendezvous(memory, group)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Tell torch for a while how ranks reach each other's memory."""
    before = {name: os.environ.get(name) for name in _SETTINGS}
    os.environ |= dict.fromkeys(_SETTINGS, "1")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _agree(group: Any, problem: str) -> None:
    """Raise on every rank what one of them has met, if one has."""
    problems = list(filter(None, _gather(group, problem)))
    if problems:
        raise UnsupportedError({"direct": problems[0]})


def _gather(group: Any, value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def _problem(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
