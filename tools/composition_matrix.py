"""Run every family of svg-models with every feature of diffusers and write the table of the docs.

    python tools/composition_matrix.py                  # all cells, some minutes
    python tools/composition_matrix.py --row "MagCache"  # these anew, the others as stored
    python tools/composition_matrix.py --family Mochi    # so, for a family that is new

Needs svg-models with its test extra. A cell that neither passes nor is refused with a sentence ends
the run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "packages" / "svg-models" / "tests"
STORED = TESTS / "composition.json"
PAGE = ROOT / "docs" / "_composition.md"
MARKS = {"yes": "✓", "before": "✓", "no": "✗", "absent": "–"}

Cells = dict[str, dict[str, dict[str, str]]]


def run(stored: Cells, rows: list[str], families: list[str]) -> dict[str, Any]:
    """Run the wanted rows and families, or all of those that are not named, and return all cells.

    Args:
        stored: cells by feature and family.
        rows: titles of features.
        families: names of `composition.CASES`.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(TESTS))
    composition = importlib.import_module("composition")
    importlib.import_module("torch").set_num_threads(1)  # the models are tiny
    cells: Cells = {}
    for title, check in {**composition.QUICK, **composition.SLOW}.items():
        cells[title] = stored.get(title, {})
        if title in (rows or [title]):
            for family in families or composition.CASES:
                cells[title][family] = asdict(check(family))
            print(title, *(cell["verdict"] for cell in cells[title].values()), flush=True)
    title = composition.ULYSSES
    cells[title] = stored.get(title, {})
    if title in (rows or [title]):
        found = {f: asdict(cell) for f, cell in composition.ulysses_cells().items()}
        cells[title] |= {family: found[family] for family in families or found}
    names = ("diffusers", "torch", "accelerate", "peft")
    return {"versions": {name: version(name).partition("+")[0] for name in names}, "cells": cells}


def render(stored: dict[str, Any]) -> str:
    """Return the table in Markdown, with a footnote for each sentence."""
    cells: Cells = stored["cells"]
    families = list(next(iter(cells.values())))
    notes: dict[str, int] = {}
    lines = ["| | " + " | ".join(families) + " |", "| --- |" + " :-: |" * len(families)]
    for title, row in cells.items():
        entries = []
        for family in families:
            verdict, sentence = row[family]["verdict"], row[family]["sentence"]
            number = notes.setdefault(sentence, len(notes) + 1) if sentence else 0
            entries.append(MARKS[verdict] + (f"[^{number}]" if number else ""))
        lines.append(f"| {title} | " + " | ".join(entries) + " |")
    lines.append("")
    lines += [f"[^{number}]: {clean(sentence)}" for sentence, number in notes.items()]
    names = ", ".join(f"{name} {number}" for name, number in stored["versions"].items())
    return "\n".join([*lines, "", f"Run with {names}.", ""])


def clean(sentence: str) -> str:
    """Keep Markdown from reading class names as HTML."""
    return sentence.replace("<class '", "`").replace("'>", "`")


def main() -> None:
    """Run the cells, store them and write the table."""
    parser = argparse.ArgumentParser(description="Write the compatibility table.")
    parser.add_argument("--row", action="append", default=[], help="run this row, others as stored")
    parser.add_argument("--family", action="append", default=[], help="so with this family")
    given = parser.parse_args()
    stored: Cells = {}
    if given.row or given.family:
        stored = json.loads(STORED.read_text(encoding="utf-8"))["cells"]
    result = run(stored, given.row, given.family)
    STORED.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(render(result), encoding="utf-8")


if __name__ == "__main__":
    main()
