"""The example of the README runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

README = Path(__file__).parents[1] / "README.md"


def test_readme_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert 8 <= len(example.splitlines()) <= 12
    names: dict[str, Any] = {}
    exec(compile(example, str(README), "exec"), names)
    x, y, gate = (names[name].float() for name in ("x", "y", "gate"))
    before = x - y * gate[:, None]
    want = F.layer_norm(before, before.shape[-1:], eps=1e-6)
    want = want * (1 + names["scale"][:, None]) + names["shift"][:, None]
    torch.testing.assert_close(y, want, rtol=0.1, atol=0.2)
    assert "auto=" in capsys.readouterr().out
