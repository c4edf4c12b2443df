"""Pages in a real browser: phone and desktop, light and dark, by pointer, by keyboard, by name."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_report
import tuned
from browser import Browser, find_browser

from svg_models.comparison.page import comparison_page
from svg_models.report import run_page
from svg_models.tuning.page import tune_page

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine")

SCREENS = [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")]
PAGES = (
    "compare",
    "many",
    "unbroken",
    "silent",
    "run",
    "dense",
    "long",
    "tune",
    "untimed",
    "missed",
)
LONG = "a" * 900
WHITE = """(canvas => {
  const row = canvas.getContext('2d').getImageData(0, 5, canvas.width, 1).data;
  for (let x = 0; x < canvas.width; x++)
    if (Math.min(row[4 * x], row[4 * x + 1], row[4 * x + 2]) === 255) return x / canvas.width;
  return -1;
})"""
"""Where a white line stands in a canvas, as a share of its width."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of every kind of page."""
    path = tmp_path_factory.mktemp("pages")
    usual = test_report.compared()
    many = test_report.compared([(f"svg2@0.{n}", n, 2.0) for n in range(11, 18)])
    settings = usual.dense.settings.replace(prompt=LONG)
    unbroken = dataclasses.replace(usual, dense=dataclasses.replace(usual.dense, settings=settings))
    silent = dataclasses.replace(
        usual,
        candidates=tuple(dataclasses.replace(c, speed=None) for c in usual.candidates),
        no_speed="the machine was busy with other work: other programs kept 2 of 2 cores busy",
    )
    facts = {"prompt": LONG, "model": LONG, "command": f"svg generate {LONG}"}
    records = tuple(
        dataclasses.replace(r, head_density=(0.1, 0.4)) for r in test_report.stats(0.25).records
    )
    pages = {
        "compare": comparison_page(usual),
        "many": comparison_page(many),
        "unbroken": comparison_page(unbroken),
        "silent": comparison_page(silent),
        "run": run_page(dataclasses.replace(test_report.stats(0.25), records=records)),
        "dense": run_page(test_report.stats(1.0, dense=True)),
        "long": run_page(dataclasses.replace(test_report.stats(0.25), facts=facts)),
        "tune": tune_page(tuned.made_up()),
        "untimed": tune_page(tuned.made_up(timed=False, prompt=LONG)),
        "missed": tune_page(tuned.made_up(found=False)),
    }
    for name, text in pages.items():
        (path / f"{name}.html").write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "theme"), SCREENS)
@pytest.mark.parametrize("page", PAGES)
def test_page_fits_and_says_no_error(
    page: str, width: int, theme: str, browser: Browser, folder: Path
) -> None:
    browser.open(folder / f"{page}.html", width=width, theme=theme)
    time.sleep(0.2)
    assert browser.complaints == []
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask("document.documentElement.scrollHeight") < 14_000
    assert browser.ask("document.querySelector('h1').getBoundingClientRect().height") < 180
    assert browser.ask("document.documentElement.dataset.theme") == theme


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page_text_has_contrast(theme: str, browser: Browser, folder: Path) -> None:
    browser.open(folder / "compare.html", theme=theme)
    pairs = [("--ink", "--bg"), ("--muted", "--bg"), ("--muted", "--card"), ("--accent", "--card")]
    for ink, paper in pairs:
        read = "(n => getComputedStyle(document.documentElement).getPropertyValue(n).trim())('{}')"
        one, other = (browser.ask(read.format(name)) for name in (ink, paper))
        assert contrast(one, other) >= 4.5, (theme, ink, paper)


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it."""
    light = []
    for colour in (one, other):
        digits = colour.lstrip("#")
        digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
        parts = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        light.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_page_everything_that_can_be_used_has_a_name(browser: Browser, folder: Path) -> None:
    browser.open(folder / "compare.html")
    names = browser.names()
    for role, name in names:
        if role in ("button", "link", "slider", "combobox", "image", "img", "heading", "checkbox"):
            assert name.strip(), role
    roles = {role for role, _ in names}
    assert {"main", "banner", "contentinfo", "slider", "combobox", "table"} <= roles
    assert ("slider", "Where the two clips meet") in names
    assert ("button", "Full screen: SVG1 @ 25%") in names


def frame(browser: Browser) -> int:
    return int(browser.ask("document.querySelector('[data-scrub]').value"))


def test_page_keyboard_steps_frames_and_plays(browser: Browser, folder: Path) -> None:
    browser.open(folder / "compare.html")
    browser.until("document.querySelector('video').readyState >= 2")
    browser.ask("document.querySelector('.play').click()")
    browser.until("document.querySelector('video').paused")
    browser.ask("document.activeElement.blur()")
    browser.ask(
        "(s => { s.value = 3; s.dispatchEvent(new Event('input')); })"
        "(document.querySelector('[data-scrub]'))"
    )
    browser.until("document.querySelector('[data-frame]').textContent === 'frame 4 / 9'")
    browser.key("ArrowRight", "ArrowRight", 39)
    browser.until("document.querySelector('[data-scrub]').value === '4'")
    browser.key("ArrowLeft", "ArrowLeft", 37)
    browser.until("document.querySelector('[data-scrub]').value === '3'")
    browser.key(" ", "Space", 32)
    browser.until("!document.querySelector('video').paused")


def test_page_a_click_on_a_curve_goes_to_its_frame_and_says_values(
    browser: Browser, folder: Path
) -> None:
    browser.open(folder / "compare.html")
    browser.until("document.querySelector('video').readyState >= 2")
    browser.click(".plots [data-plot]", across=0.98)
    browser.until("document.querySelector('[data-scrub]').value === '8'")
    assert browser.ask("document.querySelector('video').paused")
    browser.point(".plots [data-plot]", across=0.98)
    tip = browser.ask("document.querySelector('.plot .tip').textContent")
    assert tip.splitlines()[0] == "frame 9"
    assert tip.splitlines()[1].startswith("SVG2 @ 25%: 38.")
    assert tip.splitlines()[3] == "Random blocks @ 25%: identical"
    grid = "section[aria-labelledby=density] [data-plot]"
    browser.point(grid, across=0.9, down=0.3)
    said = browser.ask(
        f"document.querySelector('{grid}').closest('.plot').querySelector('.tip').textContent"
    )
    assert said == "step 5, layer 2\n25.0 %"


def test_page_worst_frame_gain_slider_and_full_screen(browser: Browser, folder: Path) -> None:
    browser.open(folder / "compare.html")
    browser.until("document.querySelector('video').readyState >= 2")
    browser.click("[data-worst]")
    browser.until("document.querySelector('video').paused")
    browser.ask(
        "(s => { s.value = '8'; s.dispatchEvent(new Event('change')); })"
        "(document.querySelector('[data-gain]'))"
    )
    filters = "getComputedStyle(document.querySelectorAll('.clip canvas')[0])"
    assert browser.ask(f"{filters}.filter") == "brightness(8)"
    assert browser.ask(f"{filters}.visibility") == "visible"
    canvas = "document.querySelector('[data-wipe] canvas')"
    browser.until(f"{canvas}.width > 300")
    edges = []
    for split in (250, 750):
        browser.ask(f"document.querySelector('[data-split]').value = {split}")
        time.sleep(0.3)
        edges.append(browser.ask(f"{WHITE}({canvas})"))
    assert edges == pytest.approx([0.25, 0.75], abs=0.02)
    browser.click(".clip:nth-child(2) [data-enlarge]")
    browser.until("document.fullscreenElement || document.querySelector('.screen.enlarged')")


def test_page_copies_and_downloads(browser: Browser, folder: Path) -> None:
    browser.open(folder / "compare.html")
    browser.until("document.querySelector('video').src.startsWith('blob:')")
    links = browser.ask(
        "[...document.querySelectorAll('[data-clip]')].map(a => [a.download, a.hidden])"
    )
    assert links == [
        ["dense.mp4", False],
        ["svg2-25.mp4", False],
        ["svg1-25.mp4", False],
        ["random-25.mp4", False],
    ]
    kept = browser.ask("JSON.parse(document.getElementById('data').textContent).runs.length")
    assert kept == 4
    assert browser.ask("document.querySelector('[data-numbers]').href").startswith("blob:")
    browser.click("[data-copy]")
    browser.until("document.querySelector('[data-copy]').textContent === 'Copied'")
    assert browser.complaints == []


def test_page_a_lone_plot_keeps_its_size(browser: Browser, folder: Path) -> None:
    browser.open(folder / "dense.html")
    assert browser.ask("document.querySelectorAll('.plot').length") == 1
    assert browser.ask("document.querySelector('.plot').getBoundingClientRect().width") <= 36 * 16


@pytest.mark.parametrize("page", ["compare", "run", "tune"])
def test_page_plots_and_tables_can_be_read_on_a_phone(
    page: str, browser: Browser, folder: Path
) -> None:
    browser.open(folder / f"{page}.html", width=390)
    heights = browser.ask(
        "[...document.querySelectorAll('.plot svg text')]"
        ".map(t => t.getBoundingClientRect().height)"
    )
    assert min(heights) > 8
    columns = "[...document.querySelectorAll('tbody th')].map(t => t.getBoundingClientRect().width)"
    assert max(browser.ask(columns), default=0) < 190, "the numbers would begin off the screen"


def test_page_a_long_value_is_scrolled_not_spread(browser: Browser, folder: Path) -> None:
    browser.open(folder / "long.html", width=390)
    tall = "[...document.querySelectorAll('dl.facts dd')].map(d => d.clientHeight)"
    assert max(browser.ask(tall)) <= 16 * 16


def test_page_a_point_of_a_search_says_what_it_is(browser: Browser, folder: Path) -> None:
    browser.open(folder / "tune.html")
    place = browser.ask(
        """(() => {
          const svg = document.querySelector('[data-plot]'), data = JSON.parse(svg.dataset.plot);
          const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
          const [x, y] = data.values[0], [left, right, top, bottom] = data.box;
          const across = left + (x - data.x[0]) / (data.x[1] - data.x[0]) * (right - left);
          const down = top + (data.y[1] - y) / (data.y[1] - data.y[0]) * (bottom - top);
          const to = { clientX: box.left + across / view.width * box.width,
                       clientY: box.top + down / view.height * box.height };
          svg.dispatchEvent(new PointerEvent('pointermove', to));
          return document.querySelector('.tip').textContent;
        })()"""
    )
    assert "no compensation" in place
    assert "of dense (1 prompt)" in place
    hidden = browser.ask(
        """(() => {
          const svg = document.querySelector('[data-plot]'), box = svg.getBoundingClientRect();
          const corner = { clientX: box.left, clientY: box.top };
          svg.dispatchEvent(new PointerEvent('pointermove', corner));
          return document.querySelector('.tip').hidden;
        })()"""
    )
    assert hidden is True
