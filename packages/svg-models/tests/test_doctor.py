"""The diagnosis of a machine."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import svg_kernels
from svg_attention import backend_status
from svg_attention.backends import BACKENDS
from svg_models import doctor
from svg_models.cli import app


def test_diagnose_every_backend_is_listed_with_what_it_says_itself() -> None:
    checks = {c.name: c for c in doctor.diagnose("cpu") if c.part == "sparse attention"}
    assert list(checks) == list(BACKENDS)
    for status in backend_status("cpu", torch.float32):
        check = checks[status.name]
        assert check.works is status.available
        assert check.detail == status.reason or check.works
        assert check.detail.endswith("is chosen") is status.chosen
    assert checks["reference"].works


def test_diagnose_what_cannot_run_says_why() -> None:
    for check in doctor.diagnose("cpu"):
        assert check.detail
        if check.part in ("sparse attention", "k-means", "fused kernels") and not check.works:
            assert len(check.detail.split()) > 3, check


@pytest.mark.parametrize(
    ("auto", "works", "who"),
    [
        ("reference", None, "diffusers"),
        ("triton", True, "the triton backend"),
        ("cuda", True, "the cuda backend"),
    ],
)
def test_diagnose_who_makes_the_heads_of_models_is_told(
    auto: str, works: bool | None, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = replace(svg_kernels.status("cpu"), auto=auto)
    monkeypatch.setattr(svg_kernels, "status", lambda device: state)
    (check,) = (c for c in doctor.diagnose("cpu") if c.name == "queries and keys")
    assert check.works is works
    assert f"rotated by {who}" in check.detail


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_diagnose_a_machine_without_a_gpu_is_told_why() -> None:
    gpu = next(c for c in doctor.diagnose() if c.name == "GPU")
    assert gpu.works is False
    assert "CUDA" in gpu.detail or "driver" in gpu.detail


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_diagnose_a_gpu_is_described() -> None:
    gpu = next(c for c in doctor.diagnose() if c.name == "GPU 0")
    assert gpu.works
    assert "compute capability" in gpu.detail
    assert "GiB" in gpu.detail


def test_diagnose_the_json_is_the_same_data() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json"])
    assert result.exit_code == 0
    listed = json.loads(result.stdout)
    assert listed == doctor.to_dict(doctor.diagnose("cpu"), "cpu")
    assert len(listed["checks"]) > 20
    assert listed["conclusion"]["sentence"]


def test_diagnose_the_table_names_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    output = CliRunner().invoke(app, ["doctor", "--device", "cpu"]).stdout
    for check in doctor.diagnose("cpu"):
        assert check.name in output
    if not torch.cuda.is_available() and not doctor._has_driver():
        assert "✗" not in output, "nothing is wrong with a machine that has no GPU"
        assert "This machine has no usable GPU" in output


def conclusion(
    monkeypatch: pytest.MonkeyPatch, device: str, *, without: str = "", capability: int = 9
) -> doctor.Conclusion:
    """Return what follows where everything works but one thing."""
    checks = [replace(check, works=check.name != without) for check in doctor.diagnose("cpu")]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    return doctor.conclude(checks, device)


@pytest.mark.parametrize(
    ("without", "command"),
    [
        ("svg-kernels", 'pip install "svg-models[kernels]"'),
        ("cuda", "pip install --force-reinstall --no-deps svg-kernels"),
        ("triton", "pip install triton"),
        ("", ""),
    ],
)
def test_conclude_names_the_one_command_for_a_gpu(
    without: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = conclusion(monkeypatch, "cuda", without=without)
    assert found.command == command
    assert found.sentence.endswith(".")


def test_conclude_an_older_gpu_needs_no_hopper_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    found = conclusion(monkeypatch, "cuda", without="cuda", capability=8)
    assert found.command == ""
    assert "on backend triton" in found.sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_conclude_a_cpu_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_has_driver", lambda: True)
    found = doctor.conclude(doctor.diagnose("cpu"), "cpu")
    assert "torch cannot use it" in found.sentence
    assert found.command.endswith("torch")
    monkeypatch.setattr(doctor, "_has_driver", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda who: {0, 1, 2, 3})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor.conclude([], "cpu").command == "unset OMP_NUM_THREADS"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert doctor.conclude([], "cpu").command == ""


def test_diagnose_asks_nvcc_for_its_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(nvcc) if name == "nvcc" else None)
    check = next(c for c in doctor.diagnose("cpu") if c.name == "nvcc")
    assert check.detail == f"V12.8.93 at {nvcc}"
    nvcc.write_text("#!/bin/sh\nexit 3\n")
    assert subprocess.run([nvcc], check=False).returncode == 3
    check = next(c for c in doctor.diagnose("cpu") if c.name == "nvcc")
    assert "does not answer" in check.detail
