"""Let these tests import the oracles that lie beside them; a compiler that only pretends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


FAKE_NVCC = """#!/bin/sh
[ "$1" = --version ] && { echo "nvcc ${FAKE_VERSION:-13.0}"; exit; }
echo "$@" >> "$FAKE_LOG"
while [ "$1" != "-o" ]; do shift; done
sleep 0.05
[ -z "$FAKE_FAILS" ] || { echo "error: no such register" >&2; exit 1; }
echo built > "$2"
"""


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """Put a compiler first that only writes its output file, and an empty cache behind it."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    compiler = home / "bin" / "nvcc"
    compiler.write_text(FAKE_NVCC)
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return compiler
