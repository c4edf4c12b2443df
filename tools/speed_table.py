"""Write the tables of the README's first screen from stored runs: how fast, and how close to dense.

    python tools/speed_table.py          # rewrite README.md
    python tools/speed_table.py --check  # fail if README.md says otherwise than the stored runs

The first table has seconds for whole videos where `bench_video.py` has stored them, and otherwise
what a layer of a sparse step takes. A test holds README and stored runs equal, so a number in the
README is one that was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from distributions import ROOT

STORED = ROOT / "benchmarks" / "results" / "h100"
README = ROOT / "README.md"
START, STOP = "<!-- speed -->\n", "<!-- /speed -->"
STEPS = ("diffusers", "SVG2", "SVG1")
VIDEOS = ("diffusers", "SVG2", "SVG2, fp8 products")
# A case of `quality.py` -> what a person calls it.
METHODS = {
    "compensation": "`svg2-comp`",
    "error": "`svg2-error`",
    "error, bias, response, repair, alike": "`SVG2.corrected`",
}
CLIPS = {"default": "128 x 128", "large": "256 x 256"}
GROUP = "{clip} clip, 20 steps, dense for 30 %, density of sparse calls: {density:g}, {method}"
DENSITIES = (0.2, 0.1, 0.05)


def stored(name: str) -> dict[str, Any] | None:
    """Return a stored run, or None if there is none of this name."""
    path = STORED / f"{name}.json"
    if not path.exists():
        return None
    return dict(json.loads(path.read_text(encoding="utf-8")))


def render(
    models: Mapping[str, Any], videos: Mapping[str, Any] | None, quality: Mapping[str, Any]
) -> str:
    """Return the tables, each with the conditions under which it was measured.

    Args:
        models: layers of sparse steps, from `bench_models.py`.
        videos: whole videos, from `bench_video.py`; takes the place of the layers where it is.
        quality: from `quality.py`.
    """
    fast = _layers(models) if videos is None else _videos(videos)
    return f"{fast}\n{_closeness(quality)}\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _layers(run: Mapping[str, Any]) -> str:
    """Return what a layer of a sparse step takes.

    Each row compares what was measured in one run: as diffusers ships the model, or both compiled.
    """
    rows = []
    for model in run["models"]:
        for suffix in ("", ", compiled"):
            times = {
                name.removesuffix(suffix): float(taken["median"]) / int(model["layers"])
                for name, taken in model["ms_per_forward"].items()
                if name.endswith(suffix) and (suffix or ", compiled" not in name)
            }
            if "diffusers" in times:
                rows.append((f"{model['name']}{suffix}", *_cells(times, STEPS, "{:.0f} ms")))
    layers = " and ".join(sorted({str(model["layers"]) for model in run["models"]}))
    says = (
        f"Milliseconds per layer of one sparse step, from a transformer of {layers} layers with "
        f"random weights; SVG2 at {run['density']:.0%} density, SVG1 at "
        f"{run['band_density']:.0%}, planning included. {_machine(run)}"
    )
    return _table(("a forward pass of", *STEPS), rows) + f"\n{says}\n"


def _videos(run: Mapping[str, Any]) -> str:
    """Return the seconds of whole videos, as published: text to decoded frames."""
    rows = []
    for video in run["videos"]:
        times = {name: sum(v["published"].values()) for name, v in video["variants"].items()}
        if "diffusers" in times:
            title = f"{video['name']}, {video['published_steps']} steps"
            rows.append((title, *_cells(times, VIDEOS, "{:,.0f} s")))
    first = run["videos"][0]
    how = "measured as a whole" if run["every_step"] else "the sum of its steps, each kind measured"
    says = (
        f"Seconds for a whole video, decoding included: {how}. SVG2 at {run['density']:.0%} "
        f"density, with the first {first['dense_steps']:.0%} of the steps and "
        f"{first['dense_layers']:.0%} of the layers dense, as published; random weights. "
        f"{_machine(run)}"
    )
    return _table(("a whole video of", *VIDEOS), rows) + f"\n{says}\n"


def _cells(times: Mapping[str, float], names: Sequence[str], unit: str) -> list[str]:
    """Return the times of one row, those after the first with how many times faster they are."""
    baseline = times[names[0]]
    cells = [unit.format(baseline)]
    for name in names[1:]:
        time = times.get(name)
        faster = f"{unit.format(time)}, **{baseline / time:.2f}x faster**" if time else ""
        cells.append(faster)
    return cells


def _closeness(run: Mapping[str, Any]) -> str:
    """Return the PSNR of sparse clips against dense ones, at falling densities."""
    cases, columns = run["cases"], []
    for clip in CLIPS:
        for density in DENSITIES:
            keys = [GROUP.format(clip=clip, density=density, method=m) for m in METHODS]
            if any(key in cases for key in keys):
                columns.append((clip, density, keys))
    head = ["PSNR against dense", *(f"{CLIPS[c]}, {d:.0%}" for c, d, _ in columns)]
    rows = [
        [title, *(_decibels(cases.get(keys[index])) for _, _, keys in columns)]
        for index, title in enumerate(METHODS.values())
    ]
    env = run["environment"]
    says = (
        f"How close a clip comes to the dense one of the same noise, at a density of its sparse "
        f"calls: {len(run['prompts'])} unseen prompts, {run['frames']} frames of the small model "
        f"that ships here, 20 steps of which the first 30% are dense. {env['device']}, torch "
        f"{env['torch']}, commit {env['commit']}."
    )
    return _table(head, rows) + f"\n{says}"


def _decibels(case: Mapping[str, Any] | None) -> str:
    return "" if case is None else f"{case['psnr']['mean']:.1f} dB"


def _machine(run: Mapping[str, Any]) -> str:
    env = run["environment"]
    return f"{env['gpu']}, torch {env['torch']}, {env['date']}."


def fill(page: str, text: str) -> str:
    """Return a page with the text between its marks replaced."""
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(STOP), re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"expected {START.strip()} ... {STOP} once")
    return pattern.sub(lambda _: f"{START}{text}{STOP}", page)


def wanted(page: str) -> str:
    """Return a README with the tables that follow from what is stored."""
    models, quality = stored("models"), stored("quality")
    if models is None or quality is None:
        raise ValueError(f"expected models.json and quality.json in {STORED}")
    return fill(page, render(models, stored("videos") or stored("video"), quality))


def main() -> int:
    """Rewrite the README, or compare it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    page = README.read_text(encoding="utf-8")
    if args.check:
        return int(page != wanted(page))
    README.write_text(wanted(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
