"""Files that appear under their name only when they are complete, whatever happens meanwhile.

Everything that this package writes goes through `atomic_path` (one file) or `atomic_folder` (a set
that belongs together). Both work in the folder of the result under a name that starts with
`.svg-`, locked while its process lives; what a killed process left is swept by the next one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from svg_models.errors import OutputError, SettingError, SvgModelsError

try:
    import fcntl
except ImportError:  # no locks there, so nothing is swept
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "atomic_folder",
    "atomic_path",
    "check_folder",
    "check_output",
    "check_suffix",
    "regular_file",
    "spare_folders",
    "sweep",
    "user_path",
    "writable_folder",
]

_PART, _READY = ".part", ".ready"
_PROBE = bytes(1 << 16)  # enough that a full disk says so


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return `path` with the home folder of `~` filled in.

    Raises:
        SettingError: if it is empty, holds a null character, or names nobody's home.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise SettingError(f"expected a path, got '{text}'")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise SettingError(f"there is no home folder for '{text}'") from error


def regular_file(path: str | os.PathLike[str], purpose: str) -> Path:
    """Return `path` if it is a file with something in it.

    Args:
        path: on this machine; a link is followed.
        purpose: completes "cannot read PATH ...", as in "as a video".

    Raises:
        SettingError: if it is missing, empty, or a folder, device, pipe or socket.
    """
    file = user_path(path)
    try:
        found = file.stat()
    except (OSError, ValueError) as error:
        raise SettingError(f"cannot read {path} {purpose} ({_reason(error)})") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, pipe or socket"
        raise SettingError(f"cannot read {path} {purpose}: expected a file, got {kind}")
    if not found.st_size:
        raise SettingError(f"cannot read {path} {purpose} (the file is empty)")
    return file


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its name only when the block succeeds.

    Missing folders are created, links are followed, and a file that is replaced keeps its mode. If
    the block is left by any exception, an interrupt included, the temporary file is removed and
    whatever stood under `path` before stays as it was.

    Args:
        path: the final file.

    Yields:
        An absolute path in the same folder, so the final rename is atomic.

    Raises:
        SettingError: if `path` is no place for a file.
        OutputError: if the file cannot be written.
    """
    final = check_output(path)
    writable_folder(final.parent)
    with (
        _said(final),
        _claimed(lambda: final.with_name(_name(_PART)), _create_file) as temporary,
    ):
        yield temporary
        _flush(temporary)
        _keep_mode(final, temporary)
        os.replace(temporary, final)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder whose files move into `path` together when the block succeeds.

    Once the first has moved the others follow, even if the process is stopped (signals wait) or
    killed (the next one that writes into `path` moves them). Pages move last, after what they show.

    Args:
        path: the folder to write into, created if missing.

    Raises:
        SettingError: if it cannot be written.
        OutputError: if a file cannot be written.
    """
    final = _absolute(writable_folder(path))
    with _said(final), _claimed(lambda: final / _name(_PART), Path.mkdir) as staging:
        yield staging
        for file in staging.iterdir():
            _flush(file)
            check_output(final / file.name)
        with _signals_wait():
            ready = staging.with_suffix(_READY)
            os.replace(staging, ready)
            _move_out(ready)


def check_output(path: str | os.PathLike[str]) -> Path:
    """Refuse a path that no file can be written to; nothing is created.

    Also sweeps what a killed process left in its folder.

    Returns:
        The absolute path that `path` means, links followed.

    Raises:
        SettingError: if it is a folder, a device, pipe or socket, its name is too long, or its
            folder cannot be written.
    """
    if os.fspath(path).endswith(("/", os.sep)):
        raise SettingError(f"expected a file to write, got the folder {path}; add a file name")
    final = _absolute(path)
    try:
        mode = final.stat().st_mode
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise SettingError(
            f"cannot write {path} ({_reason(error)}); choose a folder that can be written and a "
            "short name"
        ) from error
    else:
        if stat.S_ISDIR(mode):
            raise SettingError(f"expected a file to write, got the folder {final}; add a file name")
        if not stat.S_ISREG(mode):
            raise SettingError(
                f"{final} exists and is a device, pipe or socket, which is never replaced; choose "
                "another name"
            )
    check_folder(final.parent)
    return final


def check_outputs(path: str | os.PathLike[str], *others: str | os.PathLike[str] | None) -> Path:
    """Refuse files that cannot be written, as `check_output` does, and one that is named twice.

    Returns:
        What the first path means.

    Raises:
        SettingError: says which and why.
    """
    found = [check_output(one) for one in (path, *others) if one is not None]
    for one in found:
        if found.count(one) > 1:
            raise SettingError(f"two things cannot be written to {one}; give each its own name")
    return found[0]


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Refuse a folder that cannot be written, or could not be created; nothing is created.

    Raises:
        SettingError: says why.
    """
    folder = _absolute(path)
    there, missing = folder, []
    try:
        while not there.exists() and there != there.parent:
            missing.append(there.name)
            there = there.parent
        longest = os.pathconf(there, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        for name in missing:
            if len(os.fsencode(name)) > longest:
                raise OSError(None, f"a name of more than {longest} bytes")
        sweep(there)
        probe = there / _name(_PART)
        try:
            probe.write_bytes(_PROBE)
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"cannot write in {folder} ({_reason(error)}); choose a folder that can be written"
        ) from error
    return folder


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder `path` if it is missing and check that files can be made in it.

    Raises:
        SettingError: if it cannot be created or written.
    """
    folder = check_folder(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(
            f"cannot write in {folder} ({_reason(error)}); choose a folder that can be written"
        ) from error
    return user_path(path)


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Refuse a file name that is no mp4.

    Raises:
        SettingError: says what to write instead.
    """
    if Path(path).suffix.lower() != ".mp4":
        raise SettingError(
            f"clips are written as mp4, got '{path}'; name it {Path(path).stem or 'clip'}.mp4"
        )


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder, and finish sets that were complete.

    A lock that can be taken tells that its process is gone.
    """
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        for left in folder.glob(".svg-*"):
            if left.suffix not in (_PART, _READY):
                continue
            with contextlib.suppress(OSError), _opened(left) as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left.suffix == _READY:
                    _move_out(left)
                else:
                    _remove(left)


def _absolute(path: str | os.PathLike[str]) -> Path:
    """Return where a path leads, links followed."""
    try:
        return Path(os.path.realpath(user_path(path)))
    except OSError as error:  # as where the current folder was removed
        raise SettingError(
            f"there is no place {path} ({_reason(error)}); give a full path"
        ) from error


def spare_folders() -> Iterator[Path]:
    """Yield the folders where something can be kept that has no room where it should be."""
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir())
    with contextlib.suppress(RuntimeError):
        yield Path.home()
    yield Path("/dev/shm")


def _name(suffix: str) -> str:
    return f".svg-{secrets.token_hex(6)}{suffix}"


@contextlib.contextmanager
def _claimed(name: Callable[[], Path], create: Callable[[Path], Any]) -> Iterator[Path]:
    """Create a temporary file or folder and hold its lock; remove it at the end if it is there."""
    while True:
        temporary = name()
        create(temporary)
        try:
            with _opened(temporary) as handle:
                if fcntl is not None:
                    with contextlib.suppress(OSError):  # a file system without locks
                        fcntl.flock(handle, fcntl.LOCK_EX)
                if not temporary.exists():  # a sweep came between creating and locking it
                    continue
                yield temporary
                return
        finally:
            _remove(temporary)


def _create_file(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        yield handle
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _move_out(ready: Path) -> None:
    """Move the files of a complete set into the folder it stands in."""
    for file in sorted(ready.iterdir(), key=lambda file: (file.suffix == ".html", file.name)):
        final = Path(os.path.realpath(ready.parent / file.name))
        _keep_mode(final, file)
        os.replace(file, final)
    ready.rmdir()


def _keep_mode(final: Path, temporary: Path) -> None:
    """Give a file the owner and mode of the one that it replaces."""
    with contextlib.suppress(FileNotFoundError):
        old, new = final.stat(), temporary.stat()
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            with contextlib.suppress(PermissionError):
                os.chown(temporary, old.st_uid, old.st_gid)
        os.chmod(temporary, stat.S_IMODE(old.st_mode))


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _said(final: Path) -> Iterator[None]:
    try:
        yield
    except SvgModelsError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {final} ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM for the moment in which a set of files moves."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled on the main thread alone
        return
    waiting: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda n, _: waiting.append(n)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        for held in waiting:
            signal.raise_signal(held)
