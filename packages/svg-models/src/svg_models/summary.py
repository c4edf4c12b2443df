"""What an object shows when it is printed, and in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

__all__ = ["Summarised", "described"]


class Summarised:
    """Show a title and a few named lines instead of an address."""

    def _summary(self) -> tuple[str, list[tuple[str, str]]]:
        """Return a title and, line by line, a name and what it is."""
        raise NotImplementedError

    def __repr__(self) -> str:
        title, rows = self._summary()
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)])

    def _repr_html_(self) -> str:
        title, rows = self._summary()
        cells = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th>"
            f"<td style='text-align:left'>{escape(text)}</td></tr>"
            for name, text in rows
        )
        return f"<table><caption style='text-align:left'>{escape(title)}</caption>{cells}</table>"


def described(settings: Mapping[str, object], usual: Mapping[str, object] | None = None) -> str:
    """Return settings as `name=value`, without those that are off, unset or as usual."""
    usual = usual or {}
    shown = {
        name: value
        for name, value in settings.items()
        if name != "name"
        and value is not None
        and value is not False
        and not (name in usual and usual[name] == value)
    }
    return ", ".join(f"{name}={value}" for name, value in shown.items())
