from __future__ import annotations

import importlib.util

import pytest
import torch

from svg_attention import SparsePlan, UnsupportedError, backend_status, sparse_attention
from svg_attention.backends import BACKENDS


def test_backend_status_says_what_runs_and_why_the_others_do_not() -> None:
    found = {status.name: status for status in backend_status("cpu")}
    assert list(found) == list(BACKENDS)
    assert found["reference"].available
    assert found["reference"].reason == ""
    assert [status.name for status in found.values() if status.chosen] == ["reference"]
    has_kernels = importlib.util.find_spec("svg_kernels") is not None
    assert found["reference_fp8"].available is has_kernels
    assert ("svg-kernels is not installed" in found["reference_fp8"].reason) is not has_kernels
    for name in set(found) - {"reference", "reference_fp8"}:
        assert not found[name].available
        assert "CUDA device" in found[name].reason


def test_backend_status_gives_the_reasons_of_a_refused_call() -> None:
    plan = SparsePlan.full(1, 1, 256, 256)
    rows = torch.zeros(1, 1, 256, 64)
    with pytest.raises(UnsupportedError) as caught:
        sparse_attention(rows, rows, rows, plan, backend="triton")
    found = {status.name: status.reason for status in backend_status("cpu", head_dim=64)}
    assert found["triton"] == caught.value.reasons["triton"]


@pytest.mark.gpu
def test_backend_status_of_a_gpu_runs_what_it_promises(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        rows = torch.randn(1, 1, 256, 128, device=device, dtype=dtype)
        plan = SparsePlan.full(1, 1, 256, 256, device=device)
        for status in backend_status(device, dtype):
            if status.available and status.name in ("cuda", "triton", "reference"):
                out = sparse_attention(rows, rows, rows, plan, backend=status.name)
                assert out.isfinite().all()
