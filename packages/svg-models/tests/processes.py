"""Processes that tests start, and what is left of them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def run_ranks(script: str, count: int = 2, *arguments: str, seconds: float = 240) -> str:
    """Run a script of this folder as every rank of a group.

    The others are ended when one fails, since they would wait for it.

    Returns:
        What rank 0 wrote.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    with contextlib.ExitStack() as files:
        pairs = [
            [files.enter_context(tempfile.TemporaryFile("w+")) for _ in ("said", "complained")]
            for _ in range(count)
        ]
        ranks = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / script), *arguments],
                env=environment | {"RANK": str(rank)},
                stdout=said,
                stderr=complained,
            )
            for rank, (said, complained) in enumerate(pairs)
        ]
        deadline = time.monotonic() + seconds
        try:
            while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
                if any(rank.poll() for rank in ranks):
                    break
                time.sleep(0.05)
            codes = [rank.poll() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        failed = [n for n, code in enumerate(codes) if code]
        for rank in failed or [n for n, code in enumerate(codes) if code is None]:
            said, complained = pairs[rank]
            said.seek(0)
            complained.seek(0)
            state = "did not end" if codes[rank] is None else f"ended with {codes[rank]}"
            raise AssertionError(f"rank {rank} {state}: {said.read()[-500:]}\n{complained.read()}")
        pairs[0][0].seek(0)
        return pairs[0][0].read()


def join_ranks(backend: str = "gloo", *, seconds: float = 1800) -> None:
    """Make this process one of those that `run_ranks` has started.

    It computes on one thread, and draws the same in every run, but not what other ranks draw.

    Args:
        backend: of the group.
        seconds: how long a rank waits for the others.
    """
    torch.set_num_threads(1)
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    torch.manual_seed(dist.get_rank())


def children(process: int) -> set[int]:
    """Return the processes that descend from one, but for Python's tracker of semaphores."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            for child in map(int, task.read_text(encoding="ascii").split()):
                with contextlib.suppress(OSError):
                    if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                        found |= {child} | children(child)
    return found


def gone(processes: set[int], within: float = 5.0) -> bool:
    """Return whether processes have ended, or end soon."""
    deadline = time.monotonic() + within
    while any(
        Path(f"/proc/{process}/cmdline").exists() and alive(process) for process in processes
    ):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(process: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text(encoding="ascii")
    except OSError:
        return False
