"""Guidance, rings and exchanged heads together, on four processes."""

from __future__ import annotations

from typing import Any

import pytest
import teams_member
from processes import run_ranks


@pytest.fixture(scope="module")
def done() -> list[str]:
    """Return the checks that all processes passed."""
    return run_ranks("teams_member.py", 4).splitlines()


@pytest.mark.parametrize("check", teams_member.CHECKS, ids=lambda check: check.__name__)
def test_teams(check: Any, done: list[str]):
    assert check.__name__ in done
