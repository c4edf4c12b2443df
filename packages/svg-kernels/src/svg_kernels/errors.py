"""The one exception of this package that a machine, not an argument, causes."""

from __future__ import annotations

from collections.abc import Mapping


class UnsupportedError(RuntimeError):
    """Raised when no requested backend can run here; it has the reason of each.

    Args:
        what: what was asked for, as the subject of the message.
        reasons: backend name to the sentence that says why it cannot run.
    """

    def __init__(self, what: str, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        lines = "".join(f"\n  {name}: {why}" for name, why in self.reasons.items())
        super().__init__(f"{what} cannot run here:{lines}")
