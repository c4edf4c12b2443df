"""What an object shows when it is printed, and in a notebook."""

from __future__ import annotations

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


def described(settings: dict[str, object]) -> str:
    """Return settings as `name=value`, those that are off or unset left out."""
    shown = {k: v for k, v in settings.items() if k != "name" and v is not None and v is not False}
    return ", ".join(f"{name}={value}" for name, value in shown.items())
