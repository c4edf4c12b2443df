"""Write the tables of `docs/guide/models.md` from the registry of families and the tests' zoo.

Run with the packages of the checkout and their test requirements installed. A test fails while the
page is not what this writes.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from svg_models.families import SKIPPED, Family, known_families

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guide" / "models.md"
TESTS = ROOT / "packages" / "svg-models" / "tests"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def codes(names: Iterable[str]) -> str:
    """Return names in code type, one on a line of a table's cell."""
    return "<br>".join(f"`{name}`" for name in names)


def families() -> str:
    """Return what each family covers, and the pipelines that the tests run."""
    pipelines: dict[str, dict[str, None]] = {}
    for case in importlib.import_module("zoo").CASES:
        pipelines.setdefault(case.family, {})[type(case.build()).__name__] = None
    head = ("family", "covers", "pipelines in the tests", "checkpoints checked")
    return table(
        head,
        [
            (f"`{f.name}`", f.title, codes(pipelines[f.name]), codes(f.checkpoints))
            for f in known_families()
        ],
    )


def recipes() -> str:
    """Return the published settings."""
    head = (
        "published for",
        "tokens",
        "SVG2 clusters",
        "SVG1 density",
        "dense steps, layers",
        "source",
    )
    return table(head, [row for family in known_families() for row in _recipe_rows(family)])


def _recipe_rows(family: Family) -> list[tuple[str, ...]]:
    return [
        (
            row.title,
            f"{row.tokens:,}",
            f"{row.q_clusters} x {row.k_clusters}",
            f"{row.svg1_density:g}",
            f"{row.schedule.dense_steps:.0%}, {row.schedule.dense_layers:.1%}",
            row.source,
        )
        for row in family.recipes
    ]


def skipped() -> str:
    """Return the transformers that stay dense, and why."""
    return table(
        ("transformer", "stays dense, because"), [(f"`{k}`", v) for k, v in SKIPPED.items()]
    )


def filled(page: str) -> str:
    """Return the page with its tables renewed."""
    for part in (families, recipes, skipped):
        start, stop = f"<!-- {part.__name__} -->\n", f"<!-- /{part.__name__} -->"
        pattern = re.compile(f"{start}.*?{stop}", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"{PAGE} has no {start.strip()} ... {stop} to fill")
        page = pattern.sub("".join((start, part(), stop)), page)
    return page


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
