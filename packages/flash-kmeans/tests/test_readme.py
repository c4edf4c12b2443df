"""The example of the README runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"


def test_readme_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert 8 <= len(example.splitlines()) <= 12
    names: dict[str, Any] = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["labels"].shape == names["points"].shape[:2]
    assert (names["again"].inertia <= names["result"].inertia).all()
    assert names["model"].predict(names["rows"]).shape == (len(names["rows"]),)
    assert torch.equal(
        names["labels"], names["fk"].assign(names["points"], names["again"].centroids)
    )
