"""A hook of the site: formulas become MathML when it is built.

Browsers draw MathML themselves, so a page needs no script and asks nobody for one. A formula is
written between dollar signs; `pymdownx.arithmatex` finds it and this replaces what it leaves.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """Return a page's HTML with its formulas as MathML."""
    return _FORMULA.sub(typeset, content)


def typeset(found: re.Match[str]) -> str:
    """Return one formula as MathML, a displayed one in a box that scrolls where it must."""
    inline, displayed = found[2], found[3]
    source = html.unescape(inline if inline is not None else displayed).strip()
    formula = convert(source, display="inline" if inline is not None else "block")
    return formula if inline is not None else f'<div class="formula">{formula}</div>'
