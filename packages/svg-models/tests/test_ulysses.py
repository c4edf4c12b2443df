from __future__ import annotations

import pytest
import torch
from processes import run_ranks


def test_attend_over_ranks_gives_each_its_heads() -> None:
    assert run_ranks("exchange_member.py", 3, "cpu") == "done\n"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("seen", ["cuda", "one cuda", "captured cuda"])
def test_attend_over_ranks_on_two_gpus(seen: str) -> None:
    assert run_ranks("exchange_member.py", 2, seen) == "done\n"
