"""`svg models`."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from svg_models.cli.output import escaped, out, spoken_errors
from svg_models.cli.progress import hushed_libraries
from svg_models.model_names import check_model_name

EXAMPLES = "[bold]Examples[/]\n\nsvg models\n\nsvg models cosmos\n\nsvg models --json"


def models(
    name: Annotated[
        str | None,
        typer.Argument(help="Family, or one of its checkpoints. [dim]Default: all.[/]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """List supported model families, their checkpoints and published settings."""
    with spoken_errors():
        if name is not None:
            check_model_name(name)
        with hushed_libraries():
            from svg_models.catalog import catalog, describe, find_family

            found = catalog() if name is None else [describe(find_family(name))]
        if as_json:
            json.dump(found, sys.stdout, indent=1)
            sys.stdout.write("\n")
            return
        if name is None:
            out().print(
                "[bold]embedded[/]  a small Wan model of moving shapes in this package; the "
                "default\n"
            )
        for family in found:
            _print_family(family)
        if name is not None:
            out().print(_pipelines(found[0]))
        _print_recipes(found)
        if name is None:
            out().print(
                "Load any pipeline of these families with --model; svg models FAMILY shows details."
            )


def _print_family(family: dict[str, Any]) -> None:
    starts = {word for pipeline in family["pipelines"] for word in _starts(pipeline)}
    words = [word for word in ("text", "image", "video") if word in starts]
    what = f"[bold]{family['name']}[/]  {escaped(family['title'])}"
    out().print(what + (f"; from {', '.join(words)}" if words else ""), highlight=False)
    for checkpoint in family["checkpoints"]:
        out().print(f"  {escaped(checkpoint)}", highlight=False)
    out().print()


def _starts(pipeline: dict[str, Any]) -> list[str]:
    words = [] if pipeline["needs"] else ["text"]
    words += ["image"] if pipeline["image"] else []
    return words + (["video"] if pipeline["video"] else [])


def _pipelines(family: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("pipeline of diffusers", "starts from", "steps", "guidance", "size", "frames"):
        table.add_column(column, overflow="fold")
    for pipeline in family["pipelines"]:
        usual = pipeline["defaults"]
        words = " or ".join(_starts(pipeline))
        if pipeline["video"]:
            words += f" ({pipeline['video']})"
        size = f"{usual['width']} x {usual['height']}" if "width" in usual else ""
        numbers = (str(usual.get(key, "")) for key in ("steps", "guidance"))
        table.add_row(pipeline["name"], words, *numbers, size, str(usual.get("frames", "")))
    return table


def _print_recipes(found: list[dict[str, Any]]) -> None:
    rows = [row for family in found for row in family["recipes"]]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    if rows:
        out().print(_recipes(rows, sources))
        for number, source in enumerate(sources, start=1):
            out().print(f"\\[{number}] {escaped(source)}", highlight=False)
        out().print()
    without = [family["name"] for family in found if not family["recipes"]]
    if without:
        out().print(
            f"No published settings for {', '.join(without)}: defaults that most models share.",
            highlight=False,
        )


def _recipes(rows: list[dict[str, Any]], sources: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption = (
        "clusters: of queries x keys; mass: attention kept by SVG2; band: share of keys in SVG1's "
        "band; dense: share of the steps, from the first, that stay dense"
    )
    table.caption_justify = "left"
    table.add_column("published settings for", overflow="fold", min_width=30)
    for column in ("tokens", "clusters", "mass", "band", "dense"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{escaped(row['published_for'])} \\[{sources.index(row['source']) + 1}]",
            f"{row['tokens']:,}",
            f"{row['q_clusters']} x {row['k_clusters']}",
            f"{row['top_p']:.0%}",
            f"{row['svg1_density']:.0%}",
            f"{row['schedule']['dense_steps']:.0%}",
        )
    return table
