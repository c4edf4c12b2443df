"""The one exception the package adds to Python's own."""

from __future__ import annotations

from collections.abc import Mapping


class UnsupportedError(RuntimeError):
    """Report that no backend can run a valid request on this machine.

    Args:
        reasons: for each backend that was considered, why it cannot run.

    Attributes:
        reasons: the same mapping, as a plain dict.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        lines = "; ".join(f"{name}: {why}" for name, why in self.reasons.items())
        super().__init__(f"no backend can run this here ({lines})")
