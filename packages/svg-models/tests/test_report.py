"""Pages: one file, nothing from elsewhere, everything in it."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
import re
import shlex
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny

from svg_attention import CallRecord
from svg_models.comparison.candidate import Candidate
from svg_models.comparison.page import comparison_page
from svg_models.comparison.result import Comparison
from svg_models.comparison.timing import Speed
from svg_models.errors import SettingError
from svg_models.generation.clip import Clip
from svg_models.generation.settings import Settings
from svg_models.method_names import MethodSpec
from svg_models.report import run_page, write_run_report
from svg_models.report.plots import layer_bands
from svg_models.report.render import NBSP, percent, seconds
from svg_models.sparse.run import sparsify
from svg_models.stats import Grids, RunStats
from svg_models.video import read_video, similarity

pytestmark = pytest.mark.usefixtures("one_thread")
VOID = {"meta", "link", "input", "br"}


class Page(HTMLParser):
    """Collect what a test asks about; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.attributes.append((tag, values))
        self.addresses += [values[n] or "" for n in ("src", "href", "data") if n in values]
        if "id" in values:
            self.ids.append(values["id"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def visible(text: str) -> str:
    """Return what a page shows: no styles, scripts or controls, and no definitions of words."""
    text = re.sub(r"<(style|script|select|label)\b.*?</\1>", "", text, flags=re.S)
    return re.sub(r"<[^>]*>", "", text[: text.index('id="how"')])


def stats(density: float, *, dense: bool = False, steps: int = 5) -> RunStats:
    records = [
        CallRecord(
            step=step,
            layer=layer,
            branch=branch,
            transformer="transformer",
            method="Dense" if dense or step == 0 else "SVG2",
            density=1.0 if dense or step == 0 else density,
            seconds=0.01 * (layer + 1),
            tokens=432,
        )
        for step in range(steps)
        for branch in ("cond", "uncond")
        for layer in range(3)
    ]
    recipe = {"method": "SVG2", "settings": {"top_p": 0.9}, "schedule": {"dense_steps": 0.2}}
    messages = ("a <short> clip",)
    return RunStats(records=tuple(records), recipe=recipe, messages=messages, grid=(3, 12, 12))


def clip(method: str, shift: int, took: float) -> Clip:
    y, x = np.mgrid[:32, :48]
    frames = np.stack([np.stack([x * 4, y * 6, x + y + t], -1) for t in range(9)])
    spec = MethodSpec.parse(method)
    return Clip(
        frames=(frames + shift).clip(0, 255).astype(np.uint8),
        settings=Settings(
            prompt='a <b>red</b> & "blue" circle',
            negative_prompt=None,
            steps=5,
            guidance=4.0,
            height=32,
            width=48,
            frames=9,
            fps=12,
            seed=0,
        ),
        method=spec,
        model="embedded",
        loras=(),
        seconds=took,
        step_seconds=(took / 5,) * 5,
        decode_seconds=0.1,
        total_seconds=took + 0.3,
        peak_memory=3 << 29,
        recall=None if method == "dense" else 0.8,
        stats=stats(0.25, dense=method == "dense"),
    )


def speed(speedup: float) -> Speed:
    return Speed(
        speedup=speedup,
        bound=3.0,
        later=speedup,
        step=0.8 / speedup,
        dense_step=0.8,
        attention=0.1,
        dense_attention=0.6,
    )


THREE = (("svg2@0.25", 3, 2.0), ("svg1@0.25", 8, 5.0), ("random@0.25", 0, 4.0))


def compared(methods: Sequence[tuple[str, int, float]] = THREE) -> Comparison:
    """Return a comparison of clips that differ from dense by so many levels and took so long."""
    dense = clip("dense", 0, 4.0)
    candidates = []
    for name, shift, took in methods:
        sparse = clip(name, shift, took)
        close = similarity(sparse.frames, dense.frames)
        candidates.append(Candidate(clip=sparse, similarity=close, speed=speed(4.0 / took)))
    machine = {"device": "a CPU", "threads": 2, "dtype": "float32"}
    return Comparison(dense=dense, candidates=tuple(candidates), machine=machine)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compared()


@pytest.fixture(scope="module")
def text(comparison: Comparison) -> str:
    return comparison_page(comparison)


def test_comparison_page_the_page_parses_and_its_ids_are_unique(text: str) -> None:
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") >= 3 + 3 + 4  # per frame, density of three, time of four


def test_comparison_page_the_page_asks_nobody_for_anything(text: str) -> None:
    page = Page(text)
    for address in page.addresses:
        assert address.startswith(("data:", "#")), address[:80]
    assert all(target.startswith("#") for target in re.findall(r"url\((.)", text))
    assert "@import" not in text
    assert not re.search(r"https?://", text)
    assert "default-src 'none'" in text


def test_comparison_page_references_inside_the_plots_lead_somewhere(text: str) -> None:
    page = Page(text)
    targets = [a[1:] for a in page.addresses if a.startswith("#")]
    targets += re.findall(r"url\(#([^)]+)\)", text)
    assert targets
    assert set(targets) <= set(page.ids)


def test_comparison_page_plots_take_their_colours_from_the_page(text: str) -> None:
    plots = "".join(re.findall(r"<svg role=.*?</svg>", text, flags=re.S))
    assert "var(--series-1)" in plots
    assert "var(--kept)" in plots
    assert not re.search(r"#[0-9a-f]{6}\b", plots.replace('href="#', ""))
    for name in set(re.findall(r"var\((--[\w-]+)\)", text)):
        defined = text.count(f"{name}:")
        assert defined >= 1, name
        if name not in ("--c", "--shadow"):
            assert defined == 2, f"{name} needs a light and a dark value"


def test_comparison_page_the_clips_are_inside_and_play(
    text: str, comparison: Comparison, tmp_path: Path
) -> None:
    found = re.findall(r'<video src="data:video/mp4;base64,([^"]+)"', text)
    assert len(found) == len(comparison.clips)
    for number, (data, source) in enumerate(zip(found, comparison.clips, strict=True)):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(base64.b64decode(data))
        frames, fps = read_video(path)
        assert fps == 12
        assert len(frames) == 9
        factor = frames.shape[2] // 48
        small = frames[:, ::factor, ::factor]
        assert similarity(small, source.frames).mean_psnr > 25


def test_comparison_page_every_control_has_a_name(text: str) -> None:
    for tag, values in Page(text).attributes:
        if tag == "video" or (tag == "input" and values.get("type") == "range") or tag == "select":
            assert values.get("aria-label"), (tag, values)
        if tag == "svg" and values.get("role") == "img":
            assert values.get("aria-label")


def test_comparison_page_a_prompt_cannot_break_the_page(text: str) -> None:
    assert "<b>red</b>" not in text
    assert "&lt;b&gt;red&lt;/b&gt; &amp; &#34;blue&#34; circle" in text


def test_comparison_page_headline_numbers_are_the_closest_clip_and_honest(text: str) -> None:
    headline = text[text.index('class="headline"') : text.index('id="clips"')]
    assert "Random blocks" in headline
    assert "identical" in headline
    assert "It took as long as dense" in headline
    assert "The fastest was SVG2 @ 25% with 2.00×" in headline
    assert "Self-attention is 75 % of a dense step" in headline.replace(NBSP, " ")
    assert "no method can be more than 3.00× as fast" in headline


def test_comparison_page_shows_no_speed_where_none_can_be_claimed(comparison: Comparison) -> None:
    silent = tuple(dataclasses.replace(c, speed=None) for c in comparison.candidates)
    reason = "the machine was busy with other work: other programs kept 2 of 2 cores busy"
    unsure = dataclasses.replace(comparison, candidates=silent, no_speed=reason)
    text = comparison_page(unsure)
    assert f"No speed is shown, because {reason}." in text
    assert not re.search(r"\d×|as fast as dense|as long as dense", visible(text))
    assert "Where the time went" not in text
    data = unsure.to_dict()
    assert (data["no_speed"], [run["speed"] for run in data["runs"]]) == (reason, [None] * 4)


def test_comparison_page_says_at_which_size_it_would_gain(comparison: Comparison) -> None:
    told = "SVG2 would make a sparse step 1.1x faster from about 9,000 tokens on."
    assert told in comparison_page(dataclasses.replace(comparison, gains_from=told))


def test_comparison_page_seven_methods_keep_seven_curves_and_two_densities_two_names() -> None:
    methods = [(f"svg2@0.{n}", n, 2.0) for n in (11, 12, 13, 14, 15, 16)] + [("svg1@0.11", 3, 2.0)]
    text = comparison_page(compared(methods))
    curves = json.loads(html.unescape(re.findall(r'data-plot="([^"]*)"', text)[0]))
    assert curves["labels"][:2] == ["SVG2 @ 11%", "SVG2 @ 12%"]
    assert len(curves["values"]) == len(set(curves["labels"])) == 7
    drawn = re.findall(r'<path d="[^"]*"[^>]*style="[^"]*stroke: var\(--series-1\)', text)
    assert len(drawn) >= 2, "the sixth has the colour of the first"
    assert 'class="chip dash-1"' in text


def test_comparison_page_whole_seconds_are_shown_where_they_agree_with_the_steps() -> None:
    fast = compared([("svg2@0.25", 3, 2.0)])
    wrong = dataclasses.replace(fast.candidates[0], speed=speed(1.1))
    for candidates, shown in ((fast.candidates, True), ((wrong,), False)):
        found = comparison_page(dataclasses.replace(fast, candidates=candidates))
        assert ("4.3\u00a0s" in visible(found)) is shown


def test_comparison_page_long_prompts_are_clamped_and_their_names_short() -> None:
    short = compared([("svg2@0.25", 3, 2.0)])
    for prompt in ("word " * 180, "x" * 900):
        dense = dataclasses.replace(
            short.dense, settings=short.dense.settings.replace(prompt=prompt)
        )
        text = comparison_page(dataclasses.replace(short, dense=dense))
        assert '<h1 class="long">' in text
        assert len(re.findall(r"<title>(.*?)</title>", text)[0]) < 110
        labels = re.findall(r'aria-label="([^"]*)"', text)
        assert max(map(len, labels)) < 150
        assert prompt in text, "whole in the settings and the command"


def test_comparison_page_identical_frames_are_no_infinity(text: str) -> None:
    assert "Infinity" not in text
    assert "inf dB" not in text
    psnr = re.findall(r'data-psnr="([^"]+)"', text)
    assert json.loads(psnr[0]) is None
    assert json.loads(psnr[-1]) == [None] * 9
    assert all(math.isfinite(v) for v in json.loads(psnr[1]))


def test_run_page_shows_a_run(tmp_path: Path) -> None:
    path = write_run_report(stats(0.25), tmp_path / "new" / "run.html")
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://", text)
    assert "a &lt;short&gt; clip" in text
    assert "432 tokens" in text
    assert page.tags.count("svg") == 2
    with pytest.raises(SettingError, match="folder"):
        write_run_report(stats(0.25), tmp_path)


def test_run_page_says_every_setting_once_and_the_command(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    pipe.register_to_config(_name_or_path="some/model")
    with sparsify(pipe, "svg2@0.4", seed=4) as run:
        tiny.generate(pipe, prompt="a <red> circle", num_inference_steps=6, seed=7)
    text = write_run_report(run.stats(), tmp_path / "run.html").read_text()
    settings = text[text.index('id="settings"') : text.index('<script type="application/json"')]
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", settings))
    assert facts["model"] == "some/model"
    assert facts["prompt"] == "a &lt;red&gt; circle"
    assert (facts["num frames"], facts["num inference steps"], facts["seed"]) == ("9", "6", "7")
    assert facts["device"].startswith(("CPU", "NVIDIA"))
    assert len(facts) == settings.count("<dt>"), "each once"
    command = html.unescape(re.findall(r"<pre[^>]*>(.*?)</pre>", settings)[0])
    words = shlex.split(command)
    assert words[:3] == ["svg", "generate", "a <red> circle"]
    assert words[words.index("--seed") + 1] == "7"
    assert words[-2:] == ["--method", "svg2@0.4"]
    assert "Seconds in attention by step" in text, "without profile=True"
    numbers = json.loads(
        re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text)[0]
    )
    assert numbers["facts"]["prompt"] == "a <red> circle"


def test_run_page_a_dense_run_has_no_density_of_sparse_calls() -> None:
    text = run_page(stats(1.0, dense=True))
    assert "Density of sparse calls" not in text
    assert "attention was dense throughout" in text
    assert Page(text).tags.count("svg") == 1, "the time, and no map of nothing"


def test_run_page_shows_heads_that_differ() -> None:
    records = tuple(
        dataclasses.replace(r, head_density=(0.1, 0.2 + 0.1 * r.layer) if r.step else ())
        for r in stats(0.25).records
    )
    uneven = dataclasses.replace(stats(0.25), records=records)
    assert uneven.head_density == pytest.approx(np.array([[0.1, 0.2], [0.1, 0.3], [0.1, 0.4]]))
    text = run_page(uneven)
    assert "Density by layer and head" in text
    assert "10 % to 40 %" in text.replace(NBSP, " ")
    assert stats(0.25).head_density is None


def test_run_page_leaves_out_heads_that_differ_by_what_nobody_sees() -> None:
    records = tuple(
        dataclasses.replace(r, head_density=(0.321, 0.324)) for r in stats(0.32).records
    )
    alike = dataclasses.replace(stats(0.32), records=records)
    assert alike.head_density is not None
    assert "Density by layer and head" not in run_page(alike)


def test_run_page_shows_a_run_without_calls() -> None:
    text = run_page(RunStats(records=(), recipe={}))
    assert "no denoising step was recorded" in text
    assert Page(text).open == []


def test_grids_mean_over_branches_and_sum_their_time() -> None:
    table = stats(0.3).grids
    assert table is not None
    assert table.density.shape == (5, 3)
    assert table.density[0].tolist() == [1, 1, 1]
    assert table.density[1:] == pytest.approx(np.full((4, 3), 0.3))
    assert table.seconds is not None
    assert table.seconds[2] == pytest.approx([0.02, 0.04, 0.06])
    assert table.dense.tolist() == [[True] * 3] + [[False] * 3] * 4
    assert Grids.of([]) is None


@pytest.mark.parametrize("layers", [1, 2, 6, 7, 30, 40])
def test_layer_bands_cover_every_layer_once(layers: int) -> None:
    bands = layer_bands(layers)
    assert len(bands) == min(layers, 6)
    covered = [i for band in bands for i in range(layers)[band]]
    assert covered == list(range(layers))


def test_percent_and_seconds_are_written_for_people() -> None:
    assert [percent(x).replace(NBSP, " ") for x in (0.25, 0.025, 1.0, 0.02, 0.999)] == [
        "25 %",
        "2.5 %",
        "100 %",
        "2 %",
        "100 %",
    ]
    assert [seconds(x).replace(NBSP, " ") for x in (None, 0.043, 8.3, 26.14, 185.0)] == [
        "–",
        "0.04 s",
        "8.3 s",
        "26.1 s",
        "3 min 05 s",
    ]
