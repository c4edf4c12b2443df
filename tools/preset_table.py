"""Write presets from stored results, and their table into the documentation.

    python tools/preset_table.py docs
    python tools/preset_table.py put fast benchmarks/results/h100/quality.json \
        --case "no dense step" 0.25 "error, bias, repair" --steps 8 --for-steps 1 8 --automatic 512
    python tools/preset_table.py put fast … --size large --for-tokens 6657 1000000
    python tools/preset_table.py put fast benchmarks/results/h100/quality.json \
        benchmarks/results/h200/quality_footage.json --case "dense for 30 %" 0.05 "error, bias"
    python tools/preset_table.py put fast benchmarks/results/h100/tuned.json --for-steps 1 8

`put` takes a case of `benchmarks/quality.py`, at each size and by each judge that it was measured
at, or a recipe that `svg tune` wrote, and makes it the row of a preset for so many steps. Each file
adds its measurements to the row; all must have the same settings.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from _quality_cases import SCHEDULES  # type: ignore[import-not-found]

from svg_attention import SVG2, method_from_dict
from svg_models.presets import PRESETS, TABLE, read_table
from svg_models.recipe import FORMAT, Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guide" / "tune.md"
MARKS = ("<!-- presets -->", "<!-- /presets -->")
CORRECTIONS = ("route", "correct_bias", "repair_rows", "metric", "share_branches", "share_steps")


def row_of_cases(
    document: dict[str, Any],
    schedule: str,
    density: float,
    method: str,
    steps: int,
    evidence: str,
    size: str = "",
) -> dict[str, Any]:
    """Return the row of a preset that cases of `quality.py` give, one measurement for each size.

    Raises:
        SystemExit: if no such case was stored, or `one_row` refuses its settings at two sizes.
    """
    found = [
        case
        for case in document["cases"].values()
        if (case["schedule"], case["density"], case["method"], case["steps"])
        == (schedule, density, method, steps)
        and size in ("", case["size"])
    ]
    if not found:
        raise SystemExit(f"no case {schedule!r}, {density:g}, {method!r}, {steps} steps was stored")
    environment = document["environment"]
    judge = document.get("judge", "embedded")
    rows = []
    for case in sorted(found, key=lambda case: document["clips"][case["size"]]["tokens"]):
        floor = document["noise_floor"].get(f"{case['size']} clip, {steps} steps")
        one = {
            "model": judge if judge == "embedded" else f"{judge} judge",
            "frames": document["frames"],
            **document["clips"][case["size"]],
            "steps": steps,
            "guidance": document["guidance"],
            "prompts": len(document["prompts"]),
            "psnr": case["psnr"]["mean"],
            "psnr_spread": case["psnr"]["std"],
            "ssim": case["ssim"]["mean"],
            "flicker": case["flicker"]["mean"],
            "noise_floor": None if floor is None else floor["psnr"]["mean"],
            "work": case["total_density"],
            "machine": f"{case.get('device', environment['device'])}, {environment['dtype']}",
            "versions": {name: environment[name] for name in ("torch", "diffusers")},
            "evidence": evidence,
        }
        # Results keep the settings that there were when they were measured.
        settings = method_from_dict(case["config"]).to_dict()
        settings = {k: v for k, v in settings.items() if "clusters" not in k}
        settings["density"] = round(settings["density"], 4)
        rows.append(
            {
                "method": settings.pop("name"),
                "settings": settings,
                "schedule": SCHEDULES[schedule].to_dict(),
                "measured": [{name: value for name, value in one.items() if value is not None}],
            }
        )
    return one_row(rows)


def one_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one row with the measurements of several.

    Raises:
        SystemExit: if their settings differ: at each number of tokens a density of all calls is
            another one of the sparse calls, and has a row of its own.
    """
    first, *others = rows
    for other in others:
        differs = [name for name in ("method", "schedule") if other[name] != first[name]]
        settings = first["settings"] | other["settings"]
        differs += [n for n in settings if first["settings"].get(n) != other["settings"].get(n)]
        if differs:
            raise SystemExit(f"measured with other {', '.join(differs)}: give each its own row")
    return {**first, "measured": [one for row in rows for one in row["measured"]]}


def row_of_recipe(document: dict[str, Any], evidence: str) -> dict[str, Any]:
    """Return the row of a preset that a recipe of `svg tune` gives."""
    recipe = Recipe.from_dict(document).to_dict()
    measured = [one | {"evidence": evidence} for one in recipe["measured"]]
    return {name: recipe[name] for name in ("method", "settings", "schedule")} | {
        "measured": measured
    }


def put(table: dict[str, Any], preset: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return a table in which a row takes the place of the one with the same conditions."""
    rows = [old for old in table["presets"][preset] if old["conditions"] != row["conditions"]]
    rows = sorted([*rows, row], key=_place)
    changed = {**table, "presets": {**table["presets"], preset: rows}}
    read_table(changed)
    return changed


def _place(row: dict[str, Any]) -> tuple[list[int], bool, list[int]]:
    """Return where a row stands: by steps, those for models of some widths first, by tokens."""
    conditions = row["conditions"]
    return conditions.get("steps", [0]), "width" not in conditions, conditions.get("tokens", [0])


def markdown(table: dict[str, Any]) -> str:
    """Return the table of all presets for the documentation."""
    lines = [
        "| preset | steps | settings | measured on | PSNR | attention computed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in read_table(table).items():
        for row in rows:
            least, most = row.conditions.get("steps", (1, 10_000))
            steps = f"{least:g}" if least == most else f"{least:g} to {most:g}"
            steps = f"{least:g} or more" if most >= 10_000 else steps
            if "width" in row.conditions:
                steps += f", models of up to {row.conditions['width'][1]:g} channels"
            if "tokens" in row.conditions:
                fewest, most = row.conditions["tokens"]
                steps += (
                    f", up to {most:,g} tokens" if fewest <= 1 else f", from {fewest:,g} tokens"
                )
            settings = ", ".join(_words(row.recipe))
            for one in row.recipe.measured:
                where = (
                    f"{one.model}, {one.frames} x {one.width} x {one.height}, {one.steps} steps, "
                    f"{one.prompts} prompts, {one.machine}"
                )
                spread = "" if one.psnr_spread is None else f" ± {one.psnr_spread:.1f}"
                lines.append(
                    f"| `{name}` | {steps} | {settings} | {where} | {one.psnr:.1f}{spread} dB | "
                    f"{one.work:.0%} |"
                )
    return "\n".join(lines)


def _words(recipe: Recipe) -> list[str]:
    settings = recipe.method.to_dict()
    words = [f"density {settings['density']:g}"]
    best = SVG2.corrected(0.5).to_dict()
    if all(settings[name] == best[name] for name in CORRECTIONS):
        words.append("all corrections")
        settings = SVG2().to_dict()
    words += [
        text
        for text, there in (
            ("compensated", settings["compensate"] and settings["route"] == "mass"),
            ("routed by error", settings["route"] == "error"),
            ("bias", settings["correct_bias"]),
            ("residual", settings["correct_residual"]),
            ("repair", settings["repair_rows"] > 0),
            ("response metric", settings["metric"] == "response"),
            ("branches alike", settings["share_branches"]),
            (f"{settings['share_steps']} steps alike", settings["share_steps"] > 1),
        )
        if there
    ]
    dense = recipe.schedule.dense_steps
    words.append(f"{dense:.0%} of the steps dense" if dense else "no step dense")
    return words


def write_docs(table: dict[str, Any]) -> None:
    """Write the table into the page about tuning."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}\n{markdown(table)}\n{MARKS[1]}{after}", encoding="utf-8")


def _row_of(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the row that a file gives.

    Raises:
        SystemExit: if it is no stored result of the repository, or nobody said which of its cases.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot read {path} ({error}); name a stored result") from error
    if not isinstance(document, dict) or not {"format", "cases"} & set(document):
        raise SystemExit(f"{path} holds neither cases of quality.py nor a recipe")
    if not path.resolve().is_relative_to(ROOT):
        raise SystemExit(f"{path} is outside of the repository, where the table names its evidence")
    evidence = path.resolve().relative_to(ROOT).as_posix()
    if document.get("format") == FORMAT:
        return row_of_recipe(document, evidence)
    if args.case is None:
        raise SystemExit(f"say which case of {path}: --case SCHEDULE DENSITY METHOD")
    schedule, density, method = args.case
    return row_of_cases(document, schedule, float(density), method, args.steps, evidence, args.size)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("docs", help="write the table into the documentation")
    adder = commands.add_parser("put", help="make stored results the row of a preset")
    adder.add_argument("preset", choices=PRESETS)
    adder.add_argument("results", type=Path, nargs="+", help="each adds its measurements")
    adder.add_argument("--case", nargs=3, metavar=("SCHEDULE", "DENSITY", "METHOD"))
    adder.add_argument("--steps", type=int, default=20, help="of the case")
    adder.add_argument("--for-steps", type=int, nargs=2, default=(9, 10_000))
    adder.add_argument("--for-width", type=int, nargs=2, help="channels of the transformer")
    adder.add_argument("--for-tokens", type=int, nargs=2, help="video tokens")
    adder.add_argument("--size", default="", help="of the cases: all if none")
    adder.add_argument(
        "--automatic", type=int, default=0, help="widest model that takes it unasked"
    )
    args = parser.parse_args()
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if args.command == "put":
        row = one_row([_row_of(path, args) for path in args.results])
        head: dict[str, Any] = {"conditions": {"steps": list(args.for_steps)}}
        for name in ("width", "tokens"):
            if getattr(args, f"for_{name}"):
                head["conditions"][name] = list(getattr(args, f"for_{name}"))
        if args.automatic:
            head["automatic"] = args.automatic
        table = put(table, args.preset, head | row)
        TABLE.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_docs(table)


if __name__ == "__main__":
    main()
