"""Libraries built on this machine: where they are kept, who may write there, and under which key.

A library is code, so it is loaded only from a folder that this user owns and nobody else can write.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from svg_kernels import _build

PATIENCE = 2.0  # seconds to wait for another process in silence


def cache_root() -> Path:
    """Return the folder of all libraries built here.

    Raises:
        OSError: if neither `XDG_CACHE_HOME` nor the home folder is an absolute path.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        home = os.environ.get("HOME", os.path.expanduser("~"))
        base = os.path.join(home, ".cache")
    if not os.path.isabs(base):
        raise OSError("there is no home folder to keep a compiled library in; set XDG_CACHE_HOME")
    return Path(base) / "svg-kernels"


def find_cached(source_dir: Path, architectures: Sequence[str]) -> Path | None:
    """Return the library built here for these sources, None if there is none.

    Where no compiler is found, any compiler may have built it; the newest is taken.

    Raises:
        OSError: if there is no home folder, or the library lies where others may write.
    """
    root, sources = cache_root(), source_digest(source_dir, architectures)
    nvcc, headers = _build.find_nvcc(), _build.find_headers()
    if nvcc is not None and headers is not None:
        entries = [root / f"{sources}-{compiler_digest(nvcc, headers)}"]
    else:
        entries = sorted(root.glob(f"{sources}-*"), key=lambda path: -path.lstat().st_mtime)
    for entry in entries:
        if (entry / _build.LIBRARY).exists():
            check_private(root, entry, entry / _build.LIBRARY)
            return entry / _build.LIBRARY
    return None


def build_once(
    source_dir: Path, architectures: Sequence[str], jobs: int = 2, replace: bool = False
) -> Path:
    """Return the cached library for these sources, built now if it is not there.

    Of several processes one builds and the others wait; messages on stderr say for what.

    Args:
        source_dir: folder of the sources.
        architectures: compute capabilities without the dot, oldest first.
        jobs: how many files to compile at once.
        replace: build anew even if there is one.

    Raises:
        RuntimeError: as `_build.build`.
        OSError: if the cache cannot be written, or others may write it.
    """
    nvcc, headers = _build.find_nvcc(), _build.find_headers()
    if nvcc is None or headers is None:
        raise RuntimeError(f"cannot build the kernels: {_build.missing()}")
    root = cache_root()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(root)
    key = f"{source_digest(source_dir, architectures)}-{compiler_digest(nvcc, headers)}"
    target = root / key
    asked = time.time()
    with locked(root / f"{key}.lock"):
        for stale in root.glob(f"{key}.*"):  # of a machine that lost power while it built
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
        library = target / _build.LIBRARY
        if library.exists() and (not replace or library.stat().st_mtime > asked):
            check_private(root, target, library)
            return library
        shutil.rmtree(target, ignore_errors=True)
        names = ", ".join(f"sm_{arch}" for arch in architectures)
        tell(f"compiling for {names}, once; please wait")
        began = time.monotonic()
        library = _build.build(source_dir, target, architectures, jobs)
        tell(f"compiled in {time.monotonic() - began:.0f} s into {target}")
    return library


def source_digest(source_dir: Path, architectures: Sequence[str]) -> str:
    """Return what identifies the sources and the architectures they are compiled for."""
    digest = hashlib.sha256(repr(tuple(architectures)).encode())
    _add_files(digest, source_dir)
    return digest.hexdigest()[:16]


def compiler_digest(nvcc: Path, headers: Path) -> str:
    """Return what identifies the compilers, their flags and the headers from elsewhere."""
    digest = hashlib.sha256()
    flags = _build.compile_command(Path("nvcc"), Path("in"), Path("out"), ("90",), True)
    digest.update(repr(flags).encode())
    for compiler in (str(nvcc), os.environ.get("CXX", "c++")):
        done = subprocess.run([compiler, "--version"], capture_output=True, check=False)
        digest.update(done.stdout + b"\0")
    _add_files(digest, headers)
    return digest.hexdigest()[:16]


def _add_files(digest: hashlib._Hash, folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())


def check_private(*paths: Path) -> None:
    """Raise PermissionError unless this user owns each path and nobody else can write it."""
    for path in paths:
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode):
            raise PermissionError(f"{path} is a link; a compiled library is not loaded through one")
        if found.st_uid != os.geteuid():
            raise PermissionError(
                f"{path} belongs to user {found.st_uid}, and this process runs as "
                f"{os.geteuid()}; remove it, or set XDG_CACHE_HOME to a folder of your own"
            )
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(
                f"others may write {path}; a compiled library is loaded only from where they "
                f"cannot: chmod go-w {path}"
            )


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of a file; say on stderr whom it waits for if that takes long."""
    import fcntl

    began = told = time.monotonic()
    with file.open("a+") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
                if now - told > (PATIENCE if told == began else 30.0):
                    told = now
                    handle.seek(0)
                    owner = handle.read().strip() or "another process"
                    tell(f"waiting for {owner} to compile the kernels ({now - began:.0f} s)")
                time.sleep(0.05)
        handle.truncate(0)
        handle.write(f"process {os.getpid()}")
        handle.flush()
        yield


def tell(sentence: str) -> None:
    """Write one line to stderr."""
    print(f"svg-kernels: {sentence}", file=sys.stderr, flush=True)
