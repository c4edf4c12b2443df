"""Videos that several processes make together, beside those of one.

`member.py` is run by each of four processes, which form teams of two and of four. The first of them
says what came of each check.
"""

from __future__ import annotations

from sharing.checks import WAYS
from sharing.others import CHECKS
from sharing.subjects import SUBJECTS

__all__ = ["NAMES"]

NAMES = (*(f"{subject}: {way}" for subject in SUBJECTS for way in WAYS), *CHECKS)
"""Of all checks."""
