from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_readme_examples_run_as_printed(capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    exec(compile(blocks[0], str(README), "exec"), names)
    assert names["out"].shape == (1, 4, 1536, 64)
    records = names["session"].records()
    assert [r.method for r in records] == ["Dense"] * 2 + ["SVG2"] * 14
    assert 0.2 < records[-1].density <= 0.25
    exec(compile(blocks[1], str(README), "exec"), names)
    assert names["out"].shape == (1, 4, 1536, 64)
    assert 0.2 < names["plan"].density().mean() <= 0.25
    assert "centroids stand in for unread keys" in capsys.readouterr().out
