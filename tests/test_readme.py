"""The root README's first screen runs, and its numbers are the stored ones."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path

import pytest
import speed_table
from distributions import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON, SHELL = (
    re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) for language in ("python", "bash")
)


MODELS, QUALITY = speed_table.stored("models"), speed_table.stored("quality")


def test_the_tables_are_the_stored_runs():
    assert speed_table.wanted(README) == README


@pytest.mark.parametrize("name", ["models", "quality"])
def test_the_tables_change_with_the_stored_runs(name):
    runs = {"models": copy.deepcopy(MODELS), "videos": None, "quality": copy.deepcopy(QUALITY)}
    before = speed_table.render(**runs)
    if name == "models":
        runs["models"]["models"][0]["ms_per_forward"]["SVG2"]["median"] /= 2
    else:
        for case in runs["quality"]["cases"].values():
            case["psnr"]["mean"] += 1
    assert speed_table.render(**runs) != before


ENVIRONMENT = {"gpu": "G", "torch": "T", "date": "D"}


def test_render_compares_within_a_row_only():
    times = {"diffusers": 400.0, "SVG2": 100.0, "diffusers, compiled": 300.0, "SVG1": 200.0}
    model = {
        "name": "Toy",
        "layers": 2,
        "ms_per_forward": {name: {"median": time} for name, time in times.items()},
    }
    run = {
        "environment": ENVIRONMENT,
        "density": 0.25,
        "band_density": 0.3,
        "models": [model],
    }
    rows = speed_table.render(run, None, QUALITY).splitlines()[2:4]
    assert rows == [
        "| Toy | 200 ms | 50 ms, **4.00x faster** | 100 ms, **2.00x faster** |",
        "| Toy, compiled | 150 ms |  |  |",
    ]


def test_render_whole_videos_take_the_place_of_layers():
    video = {
        "name": "Toy, 720p",
        "published_steps": 50,
        "dense_steps": 0.2,
        "dense_layers": 0.03,
        "variants": {
            "diffusers": {"published": {"start": 5.0, "dense steps": 1990.0, "decoding": 5.0}},
            "SVG2": {"published": {"start": 5.0, "sparse steps": 790.0, "decoding": 5.0}},
        },
    }
    run = {"environment": ENVIRONMENT, "density": 0.25, "every_step": False, "videos": [video]}
    text = speed_table.render(MODELS, run, QUALITY)
    assert text.splitlines()[2] == (
        "| Toy, 720p, 50 steps | 2,000 s | 800 s, **2.50x faster** |  |"
    )
    assert "a forward pass of" not in text
    assert "the first 20% of the steps and 3% of the layers dense" in text


def test_render_closeness_has_the_cases_that_are_stored():
    mean = {"psnr": {"mean": 31.26}}
    key = speed_table.GROUP.format(clip="large", density=0.1, method="error")
    run = QUALITY | {"cases": {key: mean}}
    lines = speed_table.render(MODELS, None, run).splitlines()
    (row,) = [number for number, line in enumerate(lines) if line.startswith("| PSNR")]
    assert lines[row] == "| PSNR against dense | 256 x 256, 10% |"
    assert lines[row + 2 : row + 5] == [
        "| `svg2-comp` |  |",
        "| `svg2-error` | 31.3 dB |",
        "| `SVG2.corrected` |  |",
    ]


def test_fill_wants_its_marks():
    with pytest.raises(ValueError, match="expected <!-- speed -->"):
        speed_table.fill("no marks", "text")


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
        for part in ("<!-- speed -->", "svg generate", "svg-models[kernels]", "```python")
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
    assert lines[0] == ["pip", "install", "svg-models"]
    assert [line[:2] for line in lines[1:]] == [["svg", "generate"], ["svg", "compare"]]
    group = typer.main.get_command(app)
    for _, name, *arguments in lines[1:]:
        command = group.commands[name]
        context = command.make_context(name, list(arguments))
        assert not context.args
        assert Path(str(context.params["output"])).name in {"star.mp4", "svg-compare"}
