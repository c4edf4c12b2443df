"""The README's example runs as printed, at a size that a test can wait for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.filterwarnings("ignore:.*too short:UserWarning")
def test_readme_the_example_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, asked = tiny.pipeline(), {}
    small = dict(num_frames=9, height=48, width=48, num_inference_steps=2, output_type="np")

    class Small(diffusers.WanPipeline):
        @classmethod
        def from_pretrained(cls, name: str, **options: Any) -> Any:
            asked.update(name=name, **options)
            return cls(**pipe.components)

        def to(self, device: str) -> Any:
            asked["device"] = device
            return self

        def __call__(self, prompt: str, **settings: Any) -> Any:
            asked.update(prompt=prompt, **settings)
            return super().__call__(prompt, **small)

    monkeypatch.setattr(diffusers, "WanPipeline", Small)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, str(README), "exec"), names)
    assert (asked["device"], asked["num_frames"]) == ("cuda", 81)
    assert names["frames"].shape == (9, 48, 48, 3)
    assert names["run"].active is False
    assert (tmp_path / "report.html").stat().st_size > 10_000
