"""Attention in a ring, on two processes and, in two rings beside each other, on four."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from ring_member import CHECKS

from svg_attention import Ring


@pytest.fixture(scope="module", params=[2, 3, 4], ids=["two", "three", "two-rings-of-two"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the checks that all processes passed."""
    folder = tmp_path_factory.mktemp("ring")
    return run_ranks("ring_member.py", request.param, folder).split()


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_ring(check, done):
    assert check in done


def test_ring_asks_for_torch_distributed():
    with pytest.raises(RuntimeError, match="torchrun"):
        Ring()
