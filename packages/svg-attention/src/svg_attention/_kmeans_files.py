"""Refuse to start on the files of another `flash_kmeans`: two distributions install that name."""

from __future__ import annotations

import importlib.metadata

import flash_kmeans

OURS, OTHER = "svg-flash-kmeans", "flash-kmeans"
REPAIR = f"pip uninstall -y {OTHER} && pip install --force-reinstall --no-deps {OURS}"


def foreign_kmeans() -> str | None:
    """Return a sentence if the files found under `flash_kmeans` are not ours, else None.

    Nothing is looked up where they are ours, so this costs an attribute.
    """
    if getattr(flash_kmeans, "__distribution__", None) == OURS:
        return None
    found = " and ".join(f"{name} {_version(name)}" for name in (OURS, OTHER))
    where = (
        getattr(flash_kmeans, "__file__", None)
        or f"in {list(flash_kmeans.__path__)}, with no __init__.py"
    )
    return (
        f"the files of flash_kmeans ({where}) are not those of {OURS}, which svg-attention needs "
        f"({found}; both install this import name); repair with: {REPAIR}"
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


_sentence = foreign_kmeans()
if _sentence:
    raise ImportError(_sentence, name="flash_kmeans", path=getattr(flash_kmeans, "__file__", None))
