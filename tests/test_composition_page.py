"""The compatibility table of the documentation is the one that was run."""

from __future__ import annotations

import json

import composition_matrix


def test_the_page_shows_the_stored_cells() -> None:
    stored = json.loads(composition_matrix.STORED.read_text(encoding="utf-8"))
    assert composition_matrix.PAGE.read_text(encoding="utf-8") == composition_matrix.render(stored)


def test_each_sentence_has_one_footnote() -> None:
    def cell(verdict: str, sentence: str = "") -> dict[str, str]:
        return {"verdict": verdict, "sentence": sentence}

    page = composition_matrix.render(
        {
            "versions": {"diffusers": "1"},
            "cells": {
                "A": {"Wan": cell("yes"), "Cosmos": cell("absent", "none")},
                "B": {"Wan": cell("before", "first"), "Cosmos": cell("no", "none")},
            },
        }
    )
    assert page.splitlines() == [
        "| | Wan | Cosmos |",
        "| --- | :-: | :-: |",
        "| A | ✓ | –[^1] |",
        "| B | ✓[^2] | ✗[^1] |",
        "",
        "[^1]: none",
        "[^2]: first",
        "",
        "Run with diffusers 1.",
    ]
