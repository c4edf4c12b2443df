"""Guidance split over two processes, for every kind of pipeline."""

from __future__ import annotations

from typing import Any

import guidance_member
import pytest
from processes import run_ranks


@pytest.fixture(scope="module")
def done() -> list[str]:
    """Return the checks that both processes passed."""
    return run_ranks("guidance_member.py").splitlines()


@pytest.mark.parametrize("name", guidance_member.CASES)
def test_guidance_of_each_kind_of_pipeline(name: str, done: list[str]):
    assert name in done


@pytest.mark.parametrize("check", guidance_member.CHECKS, ids=lambda check: check.__name__)
def test_guidance(check: Any, done: list[str]):
    assert check.__name__ in done
