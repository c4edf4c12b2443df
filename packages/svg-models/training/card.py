"""The card of a judge: what it is asked for, and how it was made, beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["CARD", "read_card"]

CARD = "judge.json"


def read_card(folder: Path) -> dict[str, Any]:
    """Return the card of a folder; an empty one if there is none."""
    path = folder / CARD
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}
