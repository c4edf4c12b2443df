"""The root README's first screen runs, and its numbers are the stored ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import closeness_table
import pytest
from distributions import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON, SHELL = (
    re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) for language in ("python", "bash")
)


def test_the_table_is_the_stored_run():
    assert closeness_table.fill(README, closeness_table.render(closeness_table.stored())) == README


def test_the_table_changes_with_the_stored_run():
    run = closeness_table.stored()
    for case in run["cases"].values():
        case["psnr"]["mean"] += 1
    assert closeness_table.fill(README, closeness_table.render(run)) != README


def test_render_has_the_cases_that_are_stored():
    key = closeness_table.GROUP.format(clip="large", density=0.1, method="error")
    run = closeness_table.stored() | {"cases": {key: {"psnr": {"mean": 31.26}}}}
    lines = closeness_table.render(run).splitlines()
    assert lines[0] == "| PSNR against dense | 256 x 256, 10% |"
    assert lines[2:5] == [
        "| `svg2-comp` |  |",
        "| `svg2-error` | 31.3 dB |",
        "| `SVG2.corrected` |  |",
    ]


def test_fill_wants_its_marks():
    with pytest.raises(ValueError, match="expected <!-- closeness -->"):
        closeness_table.fill("no marks", "text")


def test_the_first_thing_is_a_picture_that_moves():
    Image = pytest.importorskip("PIL.Image")
    path = ROOT / "docs" / "assets" / "first-minute.webp"
    for page, address in (
        ("README.md", f"docs/assets/{path.name}"),
        ("docs/index.md", f"assets/{path.name}"),
    ):
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        assert f"]({address})" in lines[2], page
    assert path.stat().st_size < 3 << 20
    with Image.open(path) as picture:
        assert picture.n_frames == 49
        first = picture.convert("RGB").tobytes()
        picture.seek(24)
        assert picture.convert("RGB").tobytes() != first


def test_write_webp_keeps_every_frame_and_refuses_a_heavy_picture(tmp_path, monkeypatch):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("svg_models")
    import draw_first_minute
    import numpy as np

    frames = np.zeros((5, 16, 24, 3), np.uint8)
    frames[:, :, :, 0] = np.arange(5)[:, None, None] * 50
    draw_first_minute.write_webp(frames, tmp_path / "a.webp")
    with Image.open(tmp_path / "a.webp") as picture:
        assert (picture.n_frames, picture.size, picture.info["loop"]) == (5, (24, 16), 0)
    monkeypatch.setattr(draw_first_minute, "MOST_BYTES", 10)
    with pytest.raises(ValueError, match="more than 10"):
        draw_first_minute.write_webp(frames, tmp_path / "a.webp")


def test_the_site_opens_with_the_first_screen_of_the_readme():
    assert '--8<-- "README.md:first-minute"' in (ROOT / "docs" / "index.md").read_text()
    before, rest = README.split("<!-- --8<-- [end:first-minute] -->")
    first = before.split("<!-- --8<-- [start:first-minute] -->")[1]
    assert "](docs/" not in first, "a link into docs/ leads nowhere from the site"
    assert PYTHON[0] in first
    tables, laptop, install, snippet = (
        first.index(part)
        for part in ("<!-- videos -->", "svg generate", "svg-models[kernels]", "```python")
    )
    assert tables < laptop < install < snippet
    assert "```python" not in rest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_first_example_runs_as_printed(tmp_path, monkeypatch):
    """With the embedded model on the CPU instead of a checkpoint of 28 GB on a GPU."""
    diffusers = pytest.importorskip("diffusers")
    models = pytest.importorskip("svg_models")
    pipe = diffusers.WanPipeline.from_pretrained(models.embedded_path())
    settings = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    asked = {}

    class Small(diffusers.WanPipeline):
        """What the README names, at a size that a test can wait for."""

        def to(self, device):
            asked["device"] = device
            return self

        def __call__(self, prompt, num_frames):
            asked.update(prompt=prompt, frames=num_frames)
            return super().__call__(prompt, num_frames=17, **settings)

        @classmethod
        def from_pretrained(cls, name, **options):
            asked.update(name=name, **options)
            return cls(**pipe.components)

    monkeypatch.setattr(diffusers, "WanPipeline", Small)
    monkeypatch.chdir(tmp_path)
    (example,) = PYTHON
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert asked["name"] == "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    assert asked["device"] == "cuda"
    assert asked["frames"] == 81
    assert names["frames"].shape == (17, 64, 64, 3)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_commands_of_the_first_screen_are_understood():
    typer = pytest.importorskip("typer")
    pytest.importorskip("svg_models")
    from svg_models.cli import app

    lines = [shlex.split(line, comments=True) for line in SHELL[0].splitlines()]
    assert [line[:2] for line in lines] == [["svg", "generate"], ["svg", "compare"]]
    group = typer.main.get_command(app)
    for _, name, *arguments in lines:
        command = group.commands[name]
        context = command.make_context(name, list(arguments))
        assert not context.args
        assert Path(str(context.params["output"])).name in {"star.mp4", "svg-compare"}
