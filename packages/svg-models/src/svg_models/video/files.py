"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from svg_models.errors import SettingError

__all__ = ["atomic_path", "check_suffix", "writable_folder", "writable_path"]


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its name only when the block succeeds.

    Missing folders are created. If the block is left by any exception, an interrupt included,
    the temporary file is removed and whatever stood under `path` before stays as it was.

    Args:
        path: the final file.

    Yields:
        A path in the same folder with the same suffix, so the final rename is atomic.

    Raises:
        SettingError: if `path` is a folder or its folder cannot be written.
    """
    final = writable_path(path)
    temporary = final.with_name(f".{final.stem}.{secrets.token_hex(4)}.part{final.suffix}")
    try:
        yield temporary
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def writable_path(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a `Path` whose folder exists and can be written.

    Raises:
        SettingError: if it is a folder, or its folder cannot be created or written.
    """
    final = Path(path).expanduser()
    if final.is_dir():
        raise SettingError(f"expected a file to write, got the folder {final}; add a file name")
    writable_folder(final.parent)
    return final


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Refuse a file name that is no mp4.

    Raises:
        SettingError: says what to write instead.
    """
    if Path(path).suffix.lower() != ".mp4":
        raise SettingError(f"clips are written as mp4, got '{path}'; name it {Path(path).stem}.mp4")


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder `path` if it is missing and check that files can be made in it.

    Raises:
        SettingError: if it cannot be created or written.
    """
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".svg-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SettingError(
            f"cannot write in {folder} ({reason}); choose a folder that can be written"
        ) from error
    return folder
