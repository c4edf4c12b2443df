"""What the tests of this package share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

# `import tiny` must also work in the processes that the context parallelism test starts.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread: the models here are so small that waking a second one costs more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def launched_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the names of the kernels that make heads, in the order they are launched."""
    svg_kernels = pytest.importorskip("svg_kernels")
    names: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        launch = getattr(svg_kernels, name)

        def call(*args: Any, **options: Any) -> Any:
            names.append(name)
            return launch(*args, **options)

        return call

    for name in ("qk_norm_rope", "rope"):
        monkeypatch.setattr(svg_kernels, name, spy(name))
    return names
