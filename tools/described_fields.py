"""An extension of the API pages: a field made by `option(...)` shows its default and its help.

Without it a signature shows the whole call, the help of the command line included.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

import griffe


class DescribedFields(griffe.Extension):
    """Replaces `option(default, help, ...)` by its default, and lists the help as attributes."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Read the fields of a class that has been loaded."""
        described = []
        for name, member in cls.members.items():
            if not isinstance(member, griffe.Attribute) or not isinstance(
                member.value, griffe.ExprCall
            ):
                continue
            call = member.value
            if str(call.function) != "option":
                continue
            default, *rest = call.arguments
            member.value = default
            if rest:
                described.append((name, read_help(str(rest[0]))))
        if described and cls.docstring:
            lines = "".join(f"\n    {name}: {text}" for name, text in described)
            before, errors, after = cls.docstring.value.partition("\n\nRaises:")
            cls.docstring.value = f"{before}\n\nAttributes:{lines}{errors}{after}"


def read_help(source: str) -> str:
    """Return the text of a sum of string literals without markup; `…` stands for other terms."""
    text = "".join(_terms(ast.parse(source, mode="eval").body))
    return re.sub(r"\[/?(?:dim)?\]", "", text).replace("….", "…")


def _terms(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _terms(node.left)
        yield from _terms(node.right)
    else:
        yield str(node.value) if isinstance(node, ast.Constant) else "…"
