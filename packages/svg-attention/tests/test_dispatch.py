from __future__ import annotations

import pytest
import torch

from svg_attention import UnsupportedError
from svg_attention.planning import dispatch, reference
from svg_attention.planning.dispatch import planner_for, planner_name, select_planner

CPU = torch.device("cpu")


def test_select_planner_takes_plain_torch_on_a_cpu():
    assert select_planner("auto", CPU) is reference
    assert planner_for(torch.zeros(1, 64)) == "reference"


def test_select_planner_lists_why_one_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._selected.clear()
    with pytest.raises(UnsupportedError, match=r"CUDA device|not installed") as caught:
        select_planner("triton", CPU)
    assert set(caught.value.reasons) == set(dispatch.PLANNERS)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        planner_name("cuda", CPU)


def test_planner_for_takes_plain_torch_where_no_kernel_takes_the_rows(monkeypatch):
    monkeypatch.setattr(dispatch, "planner_name", lambda *_: "triton")
    assert planner_for(torch.zeros(1, 256)) == "triton"
    assert planner_for(torch.zeros(1, 257)) == "reference"
    assert planner_for(torch.zeros(1, 64, dtype=torch.float64)) == "reference"
