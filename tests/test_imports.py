"""Importing a package touches no GPU and needs nothing optional."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

# What a package may not call while it is imported, and what it may not need.
PROBE = """
import sys
import torch

NAMES = ["init", "is_available", "device_count", "current_device", "get_device_name",
         "get_device_properties", "get_device_capability", "synchronize", "mem_get_info"]

def forbid(name):
    def called(*args, **kwargs):
        raise RuntimeError(f"torch.cuda.{name} was called")
    setattr(torch.cuda, name, called)

for name in [*NAMES, "_lazy_init"]:
    forbid(name)

class Hiding:
    # A finder that does not find what is to be absent.

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
exec(sys.argv[2])
assert not torch.cuda.is_initialized()
"""
OPTIONAL = ("triton", "tvm_ffi", "sklearn", "flashinfer", "flash_attn", "diffusers")


def probe(source: str, absent: tuple[str, ...] = OPTIONAL) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROBE, ",".join(absent), source]
    return subprocess.run(command, text=True, capture_output=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("svg_kernels", OPTIONAL),
        ("flash_kmeans, svg_attention", (*OPTIONAL, "svg_kernels")),
    ],
)
def test_import_makes_no_gpu_call_and_needs_nothing_optional(package, absent):
    done = probe(f"import {package}", absent)
    assert done.returncode == 0, done.stderr


def test_the_probe_catches_an_offender():
    sources = {
        "torch.cuda.is_available()": "is_available was called",
        "torch.zeros(1, device='cuda')": "was called|not compiled with CUDA",
        "import triton": "No module named 'triton'",
    }
    attempts = "\n".join(
        f"try:\n    {source}\nexcept Exception as error:\n    print(error)" for source in sources
    )
    lines = probe(attempts).stdout.splitlines()
    assert len(lines) == len(sources)
    for line, message in zip(lines, sources.values(), strict=True):
        assert re.search(message, line)
