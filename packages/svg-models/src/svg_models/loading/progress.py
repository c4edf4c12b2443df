"""How loading and sampling report what they are at."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "quiet"]

Progress = Callable[[str, float, float], None]
"""Called as `progress(stage, done, total)`; a total of 0 means that it is not known."""


def quiet(stage: str, done: float, total: float) -> None:
    """Ignore progress."""
