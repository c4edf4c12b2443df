"""Presets: a name for settings whose price was measured.

The settings and what they came to stand in `presets.json` and nowhere else. A preset has rows; the
first whose conditions a clip meets is what it runs with.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svg_models.errors import SettingError
from svg_models.recipe import Recipe
from svg_models.spelling import check_names, did_you_mean

__all__ = ["PRESETS", "PresetRow", "check_preset", "find_row", "preset_rows"]

PRESETS = ("quality", "balanced", "fast")
TABLE = Path(__file__).with_name("presets.json")
# What most pipelines run with, where the number of steps is not known.
USUAL_STEPS = 50
_FORMAT = "svg-presets/1"
_CONDITIONS = ("steps", "tokens", "width")


@dataclass(frozen=True, kw_only=True)
class PresetRow:
    """Settings of a preset for clips of one kind.

    Attributes:
        recipe: what such a clip runs with; without counts, those of the clip's size are taken.
        conditions: name -> least and largest value; of denoising steps, video tokens, and channels
            of the transformer.
        automatic: the largest width of a transformer that runs with it where no method is asked
            for, because it was measured on models like it; 0 for none.
    """

    recipe: Recipe
    conditions: Mapping[str, tuple[float, float]]
    automatic: int = 0

    def suits(self, **clip: int | None) -> bool:
        """Return whether a clip meets the conditions; what is not known of it does."""
        for name, (least, most) in self.conditions.items():
            value = clip.get(name)
            if value is not None and not least <= value <= most:
                return False
        return True


def check_preset(name: str) -> str:
    """Return the name of a preset.

    Raises:
        SettingError: if there is none of this name; it names the nearest.
    """
    if name not in PRESETS:
        raise SettingError(
            f"preset must be one of {', '.join(PRESETS)}, got '{name}'{did_you_mean(name, PRESETS)}"
        )
    return name


def find_row(
    name: str, *, steps: int | None, tokens: int, width: int | None = None
) -> PresetRow | None:
    """Return the row of a preset for a clip, or None if it has none for such a clip.

    Args:
        name: of the preset.
        steps: denoising steps; as many as is usual if None.
        tokens: video tokens.
        width: channels of the transformer; None if unknown.
    """
    rows = preset_rows()[check_preset(name)]
    clip = {"steps": steps or USUAL_STEPS, "tokens": tokens, "width": width or None}
    return next((row for row in rows if row.suits(**clip)), None)


@functools.cache
def preset_rows() -> dict[str, tuple[PresetRow, ...]]:
    """Return the rows of every preset, from the table of this package."""
    return read_table(json.loads(TABLE.read_text(encoding="utf-8")))


def read_table(document: Mapping[str, Any]) -> dict[str, tuple[PresetRow, ...]]:
    """Return the rows of every preset.

    Raises:
        SettingError: if the table does not say what it must, each name and value checked.
    """
    check_names("presets", document, ("format", "presets"))
    if document.get("format") != _FORMAT or tuple(document.get("presets", ())) != PRESETS:
        raise SettingError(f"expected a table {_FORMAT} of {', '.join(PRESETS)}")
    return {
        name: tuple(_row(name, entry) for entry in entries)
        for name, entries in document["presets"].items()
    }


def _row(name: str, entry: Mapping[str, Any]) -> PresetRow:
    values = dict(entry)
    conditions = values.pop("conditions", {})
    check_names(f"conditions of preset {name}", conditions, _CONDITIONS)
    automatic = values.pop("automatic", 0)
    return PresetRow(
        recipe=Recipe.from_dict({"source": f"preset {name}", **values}, f"preset {name}"),
        conditions={key: (float(a), float(b)) for key, (a, b) in conditions.items()},
        automatic=automatic,
    )
