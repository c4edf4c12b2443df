from __future__ import annotations

import json
from typing import Any

import plan_cases
import pytest

CASES = plan_cases.cases()


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return json.loads(plan_cases.STORED.read_text())


def test_plans_unchanged_have_no_case_left_out(stored: dict[str, Any]) -> None:
    assert list(stored["plans"]) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_plans_unchanged_from_the_stored_ones(stored: dict[str, Any], name: str) -> None:
    found = [plan_cases.describe(plan) for plan in plan_cases.plans(CASES[name])]
    if plan_cases.arithmetic() == stored["arithmetic"]:
        assert found == stored["plans"][name]
        return
    # Sums round otherwise here: a cluster may change sides, but not many do.
    for one, other in zip(found, stored["plans"][name], strict=True):
        assert {k: v is None for k, v in one.items()} == {k: v is None for k, v in other.items()}
        assert one["density"] == pytest.approx(other["density"], abs=0.02)
