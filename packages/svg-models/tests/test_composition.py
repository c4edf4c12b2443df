"""The cells of the compatibility table that take a second; a tool runs all and writes the page."""

from __future__ import annotations

import json
from pathlib import Path

import composition
import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")
STORED = Path(__file__).with_name("composition.json")


@pytest.fixture(scope="module")
def stored() -> dict[str, dict[str, dict[str, str]]]:
    """Verdict and sentence by feature and family, as the documentation has them."""
    return json.loads(STORED.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("family", composition.CASES)
@pytest.mark.parametrize("title", composition.QUICK)
def test_composition_the_table_is_true(family: str, title: str, stored: dict) -> None:
    assert composition.QUICK[title](family).verdict == stored[title][family]["verdict"]


def test_composition_two_processes_share_the_heads_and_ring_attention_is_refused(
    stored: dict,
) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    cells = composition.ulysses_cells()
    expected = {f: cell["verdict"] for f, cell in stored[composition.ULYSSES].items()}
    assert {family: cell.verdict for family, cell in cells.items()} == expected


def test_composition_every_cell_is_filled_and_says_why_not(stored: dict) -> None:
    assert set(stored) == {*composition.QUICK, *composition.SLOW, composition.ULYSSES}
    for cells in stored.values():
        assert set(cells) == set(composition.CASES)
        for cell in cells.values():
            assert cell["verdict"] in ("yes", "before", "no", "absent")
            assert (cell["verdict"] == "yes") == (cell["sentence"] == "")
