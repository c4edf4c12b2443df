"""Write the table of the README's first screen from the stored run of whole transformers.

    python tools/speed_table.py          # rewrite README.md
    python tools/speed_table.py --check  # fail if README.md says otherwise than the stored run

A test holds the two equal, so a number in the README is one that was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from distributions import ROOT

STORED = ROOT / "benchmarks" / "results" / "h100" / "models.json"
README = ROOT / "README.md"
START, STOP = "<!-- speed -->\n", "<!-- /speed -->"
HEAD = ("a forward pass of", "diffusers", "SVG2", "SVG1")


def render(stored: dict[str, Any]) -> str:
    """Return the table and the conditions under which it was measured.

    Each row compares what was measured in one run: as diffusers ships the model, or both compiled.
    """
    lines = [HEAD, ("---", *["---:"] * (len(HEAD) - 1))]
    for model in stored["models"]:
        for suffix in ("", ", compiled"):
            if f"diffusers{suffix}" in model["ms_per_forward"]:
                lines.append(row(model, suffix))
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return f"{table}\n{conditions(stored)}\n"


def row(model: dict[str, Any], suffix: str) -> tuple[str, ...]:
    """Return the cells of one model, compiled or not."""
    baseline = per_layer(model, f"diffusers{suffix}")
    cells = [f"{model['name']}{suffix}", f"{baseline:.0f} ms"]
    for method in ("SVG2", "SVG1"):
        if f"{method}{suffix}" in model["ms_per_forward"]:
            time = per_layer(model, f"{method}{suffix}")
            cells.append(f"{time:.0f} ms, **{baseline / time:.2f}x faster**")
        else:
            cells.append("")
    return tuple(cells)


def per_layer(model: dict[str, Any], name: str) -> float:
    """Return the median time of a forward pass divided by its layers, in milliseconds."""
    return float(model["ms_per_forward"][name]["median"]) / int(model["layers"])


def conditions(stored: dict[str, Any]) -> str:
    """Return what was measured, on what, with which settings."""
    env = stored["environment"]
    layers = " and ".join(sorted({str(model["layers"]) for model in stored["models"]}))
    return (
        f"Milliseconds per layer of one sparse step, from a transformer of {layers} layers with "
        f"random weights; SVG2 at {stored['density']:.0%} density, SVG1 at "
        f"{stored['band_density']:.0%}, planning included. {env['gpu']}, torch {env['torch']}, "
        f"{env['date']}."
    )


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
    wanted = fill(page, render(json.loads(STORED.read_text(encoding="utf-8"))))
    if args.check:
        return int(page != wanted)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
