"""The one exception of this package that is not about a bad argument."""

from __future__ import annotations

from collections.abc import Mapping


class UnsupportedError(RuntimeError):
    """Report that no allowed backend can run a call on this machine, and why for each of them.

    Attributes:
        reasons: backend name -> one sentence saying why that backend cannot run the call.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        lines = [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        super().__init__("no backend can run this call:\n" + "\n".join(lines))

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple[dict[str, str]]]:
        return type(self), (self.reasons,)
