"""Turn templates and values into one HTML file."""

from __future__ import annotations

import colorsys
import math
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

NBSP = "\u00a0"  # keeps a number and its unit on one line
HERE = Path(__file__).parent


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder.

    Args:
        template: file name.
        **values: what it needs; strings are escaped unless they are `Markup`.

    Returns:
        A whole page with its styles and scripts inside.
    """
    css = (HERE / "page.css").read_text(encoding="utf-8")
    for name, ramp in (("light", _ramp(0.96, 0.30)), ("dark", _ramp(0.17, 0.84))):
        css = css.replace("{{ ramp_" + name + " }}", ramp)
    return (
        _environment()
        .get_template(template)
        .render(
            css=Markup(css),
            js=Markup((HERE / "page.js").read_text(encoding="utf-8")),
            version=metadata.version("svg-models"),
            date=datetime.now(timezone.utc).strftime("%d %B %Y"),
            **values,
        )
    )


def _ramp(start: float, end: float) -> str:
    """Return 16 blues from lightness `start` to `end` as CSS variables."""
    lines = []
    for i in range(16):
        lightness = start + (end - start) * i / 15
        saturation = 0.62 if start > end else 0.38 + 0.5 * i / 15
        red, green, blue = colorsys.hls_to_rgb(0.617, lightness, saturation)
        colour = "".join(f"{round(255 * part):02x}" for part in (red, green, blue))
        lines.append(f"--ramp-{i}: #{colour};")
    return "  " + " ".join(lines)


def decibels(value: float) -> str:
    """Write a PSNR for people; infinity means that nothing differs."""
    return f"{value:.1f}{NBSP}dB" if math.isfinite(value) else "identical"


def percent(share: float) -> str:
    """Write a share for people: `25 %`, `2.5 %`."""
    value = 100 * share
    digits = 0 if value >= 10 or value == round(value) else 1
    return f"{value:.{digits}f}{NBSP}%"


def gibibytes(count: int | None) -> str:
    """Write an amount of memory for people: `1.4 GiB`."""
    return "–" if count is None else f"{count / (1 << 30):.1f}{NBSP}GiB"


def seconds(value: float | None) -> str:
    """Write a time for people: `0.42 s`, `26.1 s`, `3 min 05 s`."""
    if value is None:
        return "–"
    if value >= 120:
        return f"{int(value // 60)}{NBSP}min {int(value % 60):02d}{NBSP}s"
    return f"{value:.2f}{NBSP}s" if value < 1 else f"{value:.1f}{NBSP}s"
