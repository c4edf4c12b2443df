"""Let these tests import the oracles that lie beside them, and loop in Triton's interpreter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def interpreted(triton_interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run Triton kernels on the CPU, loops with run-time bounds included.

    The interpreter keeps scalars as arrays of one element, which NumPy 2.4 no longer turns into
    an int.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)
