"""Write how close sparse clips are to dense ones into the README, from the stored run.

    python tools/closeness_table.py          # rewrite README.md
    python tools/closeness_table.py --check  # fail if README.md says otherwise than the stored run

A test holds README and stored run equal, so a number in the README is one that was measured. The
table above it, of seconds, is written by `benchmarks/bench_video.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from distributions import ROOT

STORED = ROOT / "benchmarks" / "results" / "h100" / "quality.json"
README = ROOT / "README.md"
START, STOP = "<!-- closeness -->\n", "<!-- /closeness -->"
# A case of `quality.py` -> what a person calls it.
METHODS = {
    "compensation": "`svg2-comp`",
    "error": "`svg2-error`",
    "error, bias, response, repair, alike": "`SVG2.corrected`",
}
CLIPS = {"default": "128 x 128", "large": "256 x 256"}
GROUP = "{clip} clip, 20 steps, dense for 30 %, density of sparse calls: {density:g}, {method}"
DENSITIES = (0.2, 0.1, 0.05)


def render(run: Mapping[str, Any]) -> str:
    """Return the PSNR of sparse clips against dense ones, at falling densities, and conditions."""
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
    return _table(head, rows) + f"\n{says}\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _decibels(case: Mapping[str, Any] | None) -> str:
    return "" if case is None else f"{case['psnr']['mean']:.1f} dB"


def stored() -> dict[str, Any]:
    """Return the stored run."""
    return dict(json.loads(STORED.read_text(encoding="utf-8")))


def fill(page: str, text: str) -> str:
    """Return a page with the text between its marks replaced."""
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(STOP), re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"expected {START.strip()} ... {STOP} once")
    return pattern.sub(lambda _: f"{START}{text}{STOP}", page)


def main() -> int:
    """Rewrite the README, or compare it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    page = README.read_text(encoding="utf-8")
    wanted = fill(page, render(stored()))
    if args.check:
        return int(page != wanted)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
