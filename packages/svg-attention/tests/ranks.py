"""Starting the processes of a group, each a script that gets `RANK SIZE FILE`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path


def run_ranks(script: str, size: int, folder: Path, *arguments: str, seconds: float = 120) -> str:
    """Run a script of this folder as every rank of a group; raise what the first to fail says.

    Returns:
        What rank 0 wrote.
    """
    command = [sys.executable, str(Path(__file__).parent / script)]
    outputs = [folder / f"{rank}.txt" for rank in range(size)]
    files = [path.open("w") for path in outputs]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder / "meet"), *arguments],
            stdout=files[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(size)
    ]
    end = time.monotonic() + seconds
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.poll() for rank in ranks):
                break  # the others would wait for it
            time.sleep(0.05)
        codes = [rank.poll() for rank in ranks]
    finally:
        for rank, file in zip(ranks, files, strict=True):
            rank.kill()
            rank.wait()
            file.close()
    said = [path.read_text(encoding="utf-8") for path in outputs]
    failed = [rank for rank, code in enumerate(codes) if code] or [
        rank for rank, code in enumerate(codes) if code is None
    ]
    assert not failed, f"rank {failed[0]} ended with {codes[failed[0]]}:\n{said[failed[0]]}"
    return said[0]
